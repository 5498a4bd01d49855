"""Everything that enters: feature files, pictures, slides, bags, words, and two made-up worlds.

Read first   thesis A.1.1-A.1.2 (datasets, split, contiguous batches); for pictures, slides and
             bags 3.2.1-3.2.2 and 3.3.2.
Glossary     N samples . T tokens of a sample . d_s width of stream s . C labels . a stream is one
             model's features of the same N samples

A feature file is an .npz, or a folder of .npy files, with one floating array per stream, (N, d_s),
or (N, T, d_s) for tokens, its key (or file name) the stream's name; row i is the same sample
everywhere. A row of NaN throughout: the sample lacks the stream. Reserved keys, all optional:
    labels (N,) or (N, 1) of any integer type, or (N,) text, whose sorted values are then the names
           of the labels; or (N, C) bool, where a row of False means "none of these"
    mask   (N,) bool, False = the labels of this row are not known
    label_names (C,)     split (N,) of train / val / test     groups (N,) e.g. patients
    ids, captions (N,)   images (N,) paths relative to the file, or pixels (N, H, W[, 3]) uint8
    coords (N, 4) of tiles: x, y, width, height in pixels of the slide
    grid (2,) int: rows and columns of the T tokens
    boxes (n, 6): sample, label, x0, y0, x1, y1 in shares of the picture
A row is unlabelled where its label is negative or "" or `mask` is False: it then counts neither
for nor against any label. Nothing is ever unpickled. A folder is memory-mapped: a batch reads its
own rows and no others. What a user can mend is an InputError that names the file, key or row.

Deviations   from the authors' code: rows are never joined by position alone, without a check that
             the counts agree; the short last block is shuffled among the others, not put last;
             a tile counts as tumour when half of it lies in a region (Vim4Path's notebook compares
             a sixteenth), and no tiles reach over a slide's edge (CLAM's do).
Ours         the made-up streams and tissue; weaker colour changes in `Crops`.
"""
import contextlib
import functools
import graphlib
import gzip
import hashlib
import json
import math
import os
import pathlib
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from xml.etree import ElementTree

import numpy as np
import scipy                                                 # its parts when they are first used
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

RESERVED = "labels label_names ids groups split captions images coords grid mask boxes".split()
SPLITS = ("train", "val", "test")
LARGEST = np.float32(1e15)  # of a feature: sums of squares must stay below 3e38, float32's end


class InputError(ValueError):
    """What the caller can mend: what was wrong and, after a dash, what to do."""


def refuse(when, why):
    """Raise InputError(why) where `when` holds; `why` is made in any case."""
    if when:
        raise InputError(why)


@dataclass(kw_only=True)
class Samples:
    """What is known about N samples, whatever they are.

    labels   (N,) int, negative where unlabelled, or (N, C) bool, or None; of label_names
    mask     (N,) bool, False where (N, C) labels are not known, or None
    split    (N,) of "train", "val", "test", or None
    boxes    (n, 6) of what is in the pictures, as in a file, or None
    about    dict of a file's other arrays for each sample: ids, groups, captions, images, coords
    notes    lines that the user should see"""
    labels: np.ndarray = None
    label_names: list = field(default_factory=list)
    mask: np.ndarray = None
    split: np.ndarray = None
    boxes: np.ndarray = None
    about: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)

    @property
    def labelled(self):
        """(N,) bool: the rows whose labels are known; none without labels."""
        if self.labels is None:
            return np.zeros(len(self), bool)
        known = self.labels >= 0 if self.labels.ndim == 1 else np.ones(len(self), bool)
        return known if self.mask is None else known & self.mask


@dataclass
class Features(Samples):
    """Streams of the same N samples.

    streams      dict stream -> (N, d_s) or (N, T, d_s) array of floats, perhaps memory-mapped
    parents      taxonomy: dict name -> name of its parent, None for the root; or empty
    grid         (rows, columns) of the tokens, or None
    truth        made-up data only: dict stream -> (C, d_s), each concept's direction, zeros unseen
    order        dict stream -> (N,) rows: sample i of the stream is its row order[i] (the null)
    lacks        dict stream -> (N,) bool: samples without it, NaN there; streams with gaps alone
    folder       the file's own, which `images` are relative to
    codes        of streams whose features are elsewhere: dict stream -> (indices, values), (N, k)
    whole        of `per_token`: the features whose tokens these are"""
    streams: dict
    parents: dict = field(default_factory=dict)
    grid: tuple = None
    truth: dict = None
    order: dict = field(default_factory=dict)
    lacks: dict = field(default_factory=dict)
    codes: dict = field(default_factory=dict)
    hash: str = ""
    folder: str = "."
    whole: "Features" = None

    def __len__(self):
        return len(next(iter(self.streams.values())))

    def picture(self, row):
        """A sample's picture in RGB, or None where there is none that can be read."""
        with contextlib.suppress(KeyError, InputError):
            return open_image(self.about["images"][row], folder=self.folder)

    @property
    def dims(self):
        return {s: x.shape[-1] for s, x in self.streams.items()}

    @property
    def tokens(self):
        """T, or None where a sample is a single vector."""
        x = next(iter(self.streams.values()))
        return x.shape[1] if x.ndim == 3 else None

    def sorted_rows(self):
        """Whether the training rows come sorted by their label, so that neighbours are alike."""
        if np.ndim(self.labels) != 1:
            return False
        y = self.labels[self.rows("train")]
        chance = (np.unique(y, return_counts=True)[1] / len(y)) ** 2
        return bool((y[1:] == y[:-1]).mean() > (1 + chance.sum()) / 2)

    def per_token(self):
        """The same with every token a sample, (N * T, d_s), still memory-mapped; no labels."""
        if not self.tokens:
            return self
        flat = {s: x.reshape(-1, x.shape[-1]) for s, x in self.streams.items()}    # no copy
        lacks = {s: np.repeat(gone, self.tokens) for s, gone in self.lacks.items()}
        return Features(flat, split=np.repeat(self.split, self.tokens), notes=self.notes,
                        hash=self.hash, folder=self.folder, lacks=lacks, whole=self)

    def has(self, stream, rows):
        """(n,) bool: which of `rows` have the stream."""
        return ~self.lacks[stream][rows] if stream in self.lacks else np.ones(len(rows), bool)

    def rows(self, *splits):
        """Row numbers, ascending, of the first of `splits` that has any: rows("test", "val")."""
        for name in splits:
            if (self.split == name).any():
                return np.flatnonzero(self.split == name)
        raise InputError(f"the {' and '.join(splits)} split is empty - give more samples")

    def batch(self, rows):
        """Raw features of `rows` (B,): dict stream -> (B, d_s) or (B, T, d_s) float32 tensor."""
        at = {s: self.order[s][rows] if s in self.order else rows for s in self.streams}
        return {s: torch.from_numpy(np.asarray(x[at[s]], dtype=np.float32))
                for s, x in self.streams.items()}

    def label_matrix(self, rows):
        """(len(rows), C) bool, unlabelled rows all False: see `labelled`. None without labels."""
        if self.labels is None:
            return None
        labels = np.asarray(self.labels[rows])
        if labels.ndim == 1:
            return labels[:, None] == np.arange(len(self.label_names))
        return labels & self.labelled[rows][:, None]

    def statistics(self, rows, block=4096):
        """Mean and standard deviation (d_s,) of those of `rows` that have it: dict of stream."""
        there = {s: rows[self.has(s, rows)] for s in self.streams}
        total, shift = {}, {s: self.batch(some[:1])[s][0].double() for s, some in there.items()}
        for part in np.split(rows, range(block, len(rows), block)):
            for s, x in self.batch(part).items():            # (block, d_s), shifted not to cancel
                x = (x.double() - shift[s]).numpy()[self.has(s, part)]
                total[s] = total.get(s, 0) + np.stack([x.sum(0), (x * x).sum(0)])
        means = {s: torch.from_numpy(sums / len(there[s])) for s, sums in total.items()}  # (2, d_s)
        return {s: ((mean + shift[s]).float(), (square - mean ** 2).clamp(min=0).sqrt().float())
                for s, (mean, square) in means.items()}

    def shuffled(self, seed):
        """The null: every stream but the first permuted inside each split, gaps left in place."""
        rng, order = np.random.default_rng([seed, 1]), {}
        for s in [*list(self.streams)[1:], *self.codes]:
            order[s] = np.arange(len(self))
            for name in SPLITS:
                rows = np.flatnonzero(self.split == name)
                rows = rows[self.has(s, rows)]
                order[s][rows] = rng.permutation(rows)
        codes = {s: tuple(v[order[s]] for v in pair) for s, pair in self.codes.items()}
        return replace(self, order=order, truth=None, codes=codes)


class Batches:
    """Which rows form batch `step`: of the step alone, so that a resumed run sees the same.

    shuffle="blocks": contiguous blocks of `rows` in random order (thesis A.1.2, "Data Loading
    Optimization"): what makes memory-mapped folders fast. "samples": every epoch a new permutation.
    `epoch` is the number of steps in an epoch. drop_last: without what does not fill a batch."""

    def __init__(self, rows, batch, seed, shuffle="blocks", drop_last=False):
        self.all, self.batch, self.seed, self.blocks = rows, batch, seed, shuffle == "blocks"
        self.epoch = max(len(rows) // batch, 1) if drop_last else -(-len(rows) // batch)
        self._epoch, self._order = None, None

    def rows(self, step):
        epoch, i = divmod(step, self.epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, 0, epoch])
            self._order = rng.permutation(self.epoch if self.blocks else len(self.all))
            self._epoch = epoch
        i = self._order[i] if self.blocks else i
        batch = slice(i * self.batch, (i + 1) * self.batch)
        return self.all[batch] if self.blocks else self.all[np.sort(self._order[batch])]


# ---- Feature files -------------------------------------------------------------------------------

def read_features(path, streams=None, taxonomy=None, seed=42, most=3):
    """Read and check a feature file (see the top of this module).

    streams: names to use, in this order; all by default. taxonomy: see `read_taxonomy`. seed: of
    the split, when the file has none; None to draw none. most: dimensions of a stream."""
    arrays = Source(path)
    x = {s: _stream(arrays, s, most) for s in streams or arrays.streams}
    refuse(not x, f"{path} holds no stream - give a floating array (N, d) under its name")
    first, n, *tokens = next(iter(x)), *next(iter(x.values())).shape[:-1]
    for s, a in x.items():
        refuse(a.shape[:-1] != (n, *tokens), f"stream '{s}' has shape {a.shape} but '{first}' "
               f"{x[first].shape} - give the same samples, with as many tokens")
    out = Features(x, **_told(arrays, n, seed), folder=os.path.dirname(os.path.abspath(path)))
    if tokens and "grid" in arrays:
        grid = arrays.checked("grid", "two numbers: rows and columns", (np.number, 2))
        if not (grid > 0).all() or grid.prod() != tokens[0]:
            raise InputError(f"'grid' is {grid.tolist()} for {tokens[0]} tokens - give its sides")
        out.grid = int(grid[0]), int(grid[1])
    if taxonomy:
        out.parents = read_taxonomy(taxonomy, out.label_names)
    return _scan(out)


class Source:
    """The arrays of an .npz or of a folder of .npy, by key, read when asked for; a folder's are
    memory-mapped. What else lies there is passed over."""

    def __init__(self, path):
        self.path, self.npz, self.made = path, None, {}
        if os.path.isdir(path):
            names = sorted(os.listdir(path))
        else:
            with reading(path, ".npz file"):
                self.npz = np.load(path, allow_pickle=False)
            refuse(isinstance(self.npz, np.ndarray),
                   f"{path} holds an array without a name - write it by numpy.savez")
            names = self.npz.zip.namelist()
        self.keys = [name[:-4] for name in names if name.endswith(".npy")]
        self.streams = [key for key in self.keys if key not in RESERVED]
        odd = [key for key in self.keys if not key.isprintable()]
        refuse(odd, f"{path} has the keys {odd} - name them in printable letters")

    def __contains__(self, key):
        return key in self.keys or key in self.made

    def __getitem__(self, key):
        if key in self.made:
            return self.made[key]
        name, what = f"{key}.npy", f"{self.path}, key '{key}'"
        if self.npz is None:
            path = os.path.join(self.path, name)
            with reading(path, ".npy file"):                 # a map checks the declared size itself
                return _plain(np.lib.format.open_memmap(path, "r"), path)
        with reading(what, "array of an .npz file"), self.npz.zip.open(name) as f:
            version = np.lib.format.read_magic(f)[0]
            shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(f)
            size = math.prod(shape) * dtype.itemsize         # numpy makes room for that first
            if not dtype.hasobject and size != self.npz.zip.getinfo(name).file_size - f.tell():
                raise ValueError(f"declares {size} bytes")
            return _plain(self.npz[name], what)

    def checked(self, key, wanted, *allowed):
        """The array of a key, or None without it. It must be as one of `allowed`, each (a kind of
        numpy, *shape), where None is any length."""
        if key not in self:
            return None
        a = self[key]
        for kind, *shape in allowed:
            alike = len(shape) == a.ndim and all(n in (None, m) for n, m in zip(shape, a.shape))
            if alike and np.issubdtype(a.dtype, kind):
                return a
        raise InputError(f"'{key}' has shape {a.shape} and type {a.dtype} - give {wanted}")


def plain_file(path):
    """The path, unless a pipe, device or folder is there; a missing file is for who opens it."""
    if "\0" in os.fspath(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise InputError(f"{path} is no plain file - name one")
    return path


def plain_name(name, source):
    """A name that a file gives, if a file or folder may be called so: it must not lead anywhere
    else. source: where it stands, for the message."""
    if not name or name in (".", "..") or not name.isprintable() or re.search(r"[/\\:]", name):
        raise InputError(f"{source} {name!r}, which names a file - take plain words, no folders")
    return name


def read_json(path):
    """What a JSON file holds."""
    with reading(path, "JSON file"), open(path, "rb") as f:
        return json.loads(f.read())


@contextlib.contextmanager
def reading(path, what):
    """Whatever is raised of the file `path`, which is to be a `what`, becomes one line: libraries
    raise many kinds of errors for damaged files."""
    try:
        plain_file(path)
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no file or folder {path} - check the path")
    except MemoryError:
        raise InputError(f"{path} does not fit into memory - give a folder of .npy")
    except Image.DecompressionBombError:
        raise InputError(f"{path} is too large for one picture - `tile` it with openslide")
    except Exception as e:
        why = " ".join(str(e).split())[:120] or type(e).__name__
        raise InputError(f"{path} is not a readable {what} ({why}) - write it again")


def _plain(x, what):
    """The array x, if it holds numbers or text; text that comes as UTF-8 bytes is decoded."""
    refuse(x.dtype.kind not in "biufUS", f"{what} holds {x.dtype} - save plain numbers or strings")
    if x.dtype.kind == "S":
        return np.char.decode(x, "utf-8", "replace")
    if x.dtype.kind == "U":
        "".join(x.ravel().tolist()).encode().decode()        # a ValueError for what is no text
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def _stream(arrays, name, most=3):
    """A stream's array, of two dimensions or at most `most`."""
    refuse(name not in arrays.streams, f"{arrays.path} has no stream '{name}' - it has "
           f"{', '.join(arrays.streams) or 'none'}")
    x = arrays[name]
    tokens = " or (samples, tokens, width)" if most > 2 else ", no tokens"
    refuse(not np.issubdtype(x.dtype, np.floating), f"stream '{name}' holds {x.dtype} - convert it "
           f"to a float type (reserved keys: {', '.join(RESERVED)})")
    refuse(not 2 <= x.ndim <= most or 0 in x.shape, f"{arrays.path}: stream '{name}' has shape "
           f"{x.shape} - give (samples, width){tokens}, at least one of each")
    return x


def _told(arrays, n, seed=None):
    """What a file says of its n samples: the fields of `Samples`; with a seed always a split."""
    each, pixels, notes = (np.generic, n), (np.uint8, n, None, None), []
    about = {key: arrays.checked(key, f"(N,) values, N = {n}", each)
             for key in ("ids", "groups", "captions", "split")}
    about["coords"] = arrays.checked("coords", f"(N, 4) numbers, N = {n}", (np.number, n, 4))
    about["images"] = arrays.checked("images", f"(N,) paths or (N, H, W[, 3]) uint8, N = {n}",
                                     (np.character, n), pixels, (*pixels, 3))
    about = {key: a for key, a in about.items() if a is not None}
    labels, names, mask = _read_labels(arrays, n)
    split, groups = about.pop("split", None), about.get("groups")
    if split is not None or seed is not None:
        split = _split(split, groups, n, seed)
        if groups is not None:
            found = Counter(g for g, _ in {*zip(groups.tolist(), split.tolist())})
            torn = sorted(g for g, parts in found.items() if parts > 1)
            notes = [f"{len(torn)} of {len(found)} groups (first: {g}) lie in several splits"
                     for g in torn[:1]]
    return dict(labels=labels, label_names=names, mask=mask, about=about, split=split, notes=notes,
                boxes=_read_boxes(arrays, n, len(names)))


def _read_labels(arrays, n):
    """(labels, names, mask) of n samples; a mask of (N,) labels has made these negative."""
    mask = arrays.checked("mask", "(N,) booleans, False = labels not known", (np.bool_, n))
    if "labels" not in arrays:
        return None, [], None
    labels, names = arrays["labels"], None
    if labels.ndim and len(labels) != n:
        raise InputError(f"'labels' has {len(labels)} entries for {n} samples - give one each")
    if "label_names" in arrays:
        names = np.ravel(arrays["label_names"]).astype(str).tolist()
    if labels.ndim == 1 and labels.dtype.kind == "U":
        names = sorted({*labels.tolist()} - {""}) if names is None else names
        number = {"": -1, **{name: i for i, name in enumerate(names)}}
        for i in np.flatnonzero(~np.isin(labels, [*number]))[:1]:
            raise InputError(f"'labels' row {i} is {labels[i][:40]!r}, no 'label_names' - add it")
        labels = np.array([number[word] for word in labels.tolist()])
    labels, count = _numbers(labels, names)
    if names is None:
        names = [f"label {i}" for i in range(count)]
    if len(names) < count or labels.ndim == 2 and len(names) != count:
        raise InputError(f"'label_names' has {len(names)} names for {count} labels - give one each")
    if labels.ndim == 1 and mask is not None:
        labels, mask = np.where(mask, labels, -1), None
    return labels, names, mask


def _numbers(labels, names):
    """Labels as numbers or flags, (N,) int64 or (N, C) bool, and how many there are."""
    whole = np.issubdtype(labels.dtype, np.integer)
    if whole and labels.ndim == 2 and labels.shape[1] == 1 and len(names or ()) != 1:
        labels = labels[:, 0]                                # as MedMNIST has it
    if whole and labels.ndim == 1:
        row, most = labels.argmax(), int(labels.max())
        if most >= max(len(labels), 1000, len(names or ())):       # each takes a column
            raise InputError(f"'labels' row {row} is {most} - number the classes from 0")
        return labels.astype(np.int64), max(most + 1, 0)
    flags = labels.dtype == bool or whole and labels.size and 0 <= labels.min() <= labels.max() <= 1
    if labels.ndim == 2 and labels.size and flags:
        return labels.astype(bool, copy=False), labels.shape[1]
    raise InputError(f"'labels' has shape {labels.shape} and type {labels.dtype} - give (N,) whole "
                     "numbers or text, or (N, C) booleans")


def _read_boxes(arrays, n, labels):
    """(n, 6) boxes whose samples and labels exist, or None."""
    boxes = arrays.checked("boxes", "rows of sample, label, x0, y0, x1, y1", (np.number, None, 6))
    most = max(labels, 1)
    if boxes is None:
        return None
    inside = (boxes >= 0) & (boxes < [n, most, 1, 1, np.inf, np.inf])    # False of NaN
    inside[:, 2:4] &= boxes[:, 2:4] < boxes[:, 4:]
    inside[:, 4:] &= boxes[:, 4:] <= 1
    for row in np.flatnonzero(~inside.all(1))[:1]:
        raise InputError(f"'boxes' row {row} is {boxes[row].tolist()} - give a sample of {n}, a "
                         f"label of {most}, and x0 < x1, y0 < y1 in shares of the picture, 0 to 1")
    return boxes


def _split(given, groups, n, seed):
    """(N,) of train / val / test: as given; else 80 % of groups or samples train (thesis A.1.2)."""
    if given is not None:
        for row in np.flatnonzero(~np.isin(given, SPLITS))[:1]:
            raise InputError(f"'split' row {row} is '{given[row]}' - use train, val or test")
        return given
    unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    order = np.random.default_rng([seed, 2]).permutation(unit.max() + 1)
    return np.where(np.isin(unit, order[round(0.8 * len(order)):]), "val", "train")   # whole groups


def _scan(features, block_bytes=1 << 24):
    """One pass over all streams: find what samples lack (rows of NaN), refuse other NaN and Inf,
    count zero rows, and hash. A sample without any stream is in no split."""
    digest, lacks, notes = hashlib.sha256(), {}, features.notes
    for s, x in features.streams.items():
        digest.update(f"{s} {x.dtype} {x.shape}".encode())
        step, zeros = max(1, block_bytes // (x[0].size * x.itemsize)), 0
        gap = lacks[s] = np.zeros(len(x), bool)
        for start in range(0, len(x), step):
            block = np.ascontiguousarray(x[start:start + step]).reshape(-1, x[0].size)
            bad = ~(np.abs(block) <= LARGEST).all(1)         # so compared, NaN is bad too
            gap[start:start + step][bad] = np.isnan(block[bad]).all(1)
            bad &= ~gap[start:start + step]
            if bad.any():
                finite = np.isfinite(block[bad.argmax()]).all()
                what = "numbers beyond 1e15" if finite else "NaN or Inf"
                raise InputError(f"stream '{s}' has {what} in {bad.sum()} or more rows, first row "
                                 f"{start + bad.argmax()} - mend or scale it, or have it all NaN")
            zeros += int((~block.any(1)).sum())
            digest.update(block)
        if zeros:
            notes.append(f"stream '{s}' has {zeros} all-zero rows: the loss skips them, retrieval "
                         "counts them as missed")
        refuse(gap.all(), f"stream '{s}' is NaN throughout - mend it, or leave it out")
        if gap.any():
            features.lacks[s] = gap
            notes.append(f"stream '{s}' is missing (NaN) in {gap.sum()} of {len(x)} samples")
    nothing = np.logical_and.reduce(list(lacks.values()))
    if nothing.any():
        features.split = np.where(nothing, "", features.split)
        notes.append(f"{nothing.sum()} samples have no stream at all, and are left out")
    for a in (features.labels, features.mask, features.split):
        digest.update(b"" if a is None else np.ascontiguousarray(a).tobytes())
    digest.update(f"{features.label_names}{sorted(features.parents.items(), key=str)}".encode())
    features.hash = digest.hexdigest()[:16]
    return features


def read_taxonomy(path, label_names):
    """Read a taxonomy from JSON: {"child": "parent", ..., "root": null}, or nested {"LabelName",
    "Subcategory": [...]} as Open Images has it (a name that stands twice counts where it is
    deepest). Returns dict name -> parent or None: one root, no cycle, every label in it."""
    parents = tree = read_json(path)
    with reading(path, "taxonomy"):
        if "LabelName" in tree:
            parents, queue = {}, [(tree, None)]              # breadth first: last seen is deepest
            for node, parent in queue:
                parents[node["LabelName"]] = parent
                queue += [(child, node["LabelName"]) for child in node.get("Subcategory", [])]
        for child, parent in parents.items():
            refuse(parent is not None and parent not in parents,
                   f"taxonomy: '{child}' has the unknown parent '{parent}' - add it")
    above = {child: [parent] for child, parent in parents.items() if parent is not None}
    try:
        graphlib.TopologicalSorter(above).prepare()
    except graphlib.CycleError as e:
        raise InputError(f"taxonomy: '{min(e.args[1])}' is its own ancestor - break the cycle")
    roots = len(parents) - len(above)                        # entries without a parent
    refuse(roots != 1, f"taxonomy has {roots} roots - give exactly one entry the parent null")
    for name in label_names:
        refuse(name not in parents, f"taxonomy lacks the label '{name}' - add it")
    return parents


def read_names(path, n_latents):
    """A file of names, {"17": "round nucleus"}: dict latent -> name."""
    found = read_json(path)
    if not isinstance(found, dict) or not all(re.fullmatch(r"\d{1,9}", k) for k in found):
        raise InputError(f'{path} is no file of names - write {{"17": "round nucleus"}}')
    names = {int(k): str(v) for k, v in found.items()}
    last = max(names, default="-")
    if not names or last >= n_latents:
        raise InputError(f"{path}: latent {last} is not among the run's {n_latents} - mend it")
    return names


def with_codes(features, path):
    """The features beside codes of the same samples, which `encode` wrote of streams that are
    elsewhere: (Features, number of latents, most latents of a sample)."""
    arrays, codes, lacks, n = Source(path), {}, {**features.lacks}, len(features)
    refuse("n_latents" not in arrays or "mode" in arrays and arrays["mode"] != "alone",
           f"{path} holds no codes that streams chose alone - let encode write them")
    L = int(arrays.checked("n_latents", "one whole number", (np.integer,)))
    for s in [key[:-8] for key in arrays.keys if key.endswith("_indices")]:
        j = arrays.checked(f"{s}_indices", f"(N, k) latents, N = {n}, none of tokens",
                           (np.integer, n, None))
        v = arrays.checked(f"{s}_values", f"{j.shape} numbers", (np.floating, *j.shape))
        if v is None or not (j.size and v.min() >= 0 and np.isfinite(v).all()
                             and -1 <= j.min() <= j.max() < L):
            raise InputError(f"{path}: '{s}' is no code of {L} latents - write it by encode")
        codes[s] = j.astype(np.int64), v.astype(np.float32)
        if (j[:, 0] < 0).any():
            lacks[s] = j[:, 0] < 0
    own, ids = features.about.get("ids"), arrays.checked("ids", f"(N,), N = {n}", (np.generic, n))
    refuse(own is not None and ids is not None and (own != ids).any(),
           f"{path} has other 'ids' - give the same samples in the same order")
    refuse(not codes or codes.keys() & features.streams.keys(),
           f"{path} has codes of {', '.join(codes) or 'nothing'} - give those of other streams")
    found = f"{features.hash} {_digest(*(v for pair in codes.values() for v in pair))}"
    wide, split = max(j.shape[1] for j, _ in codes.values()), features.split
    codes = {s: tuple(np.pad(v, ((0, 0), (0, wide - v.shape[1])), constant_values=rest)
                      for v, rest in zip(pair, (-1, 0))) for s, pair in codes.items()}
    if "split" in arrays:                                    # of who trained: test stays unseen
        told = arrays.checked("split", f"(N,), N = {n}", (np.character, n))
        split = _split(np.where(told == "", split, told), None, n, 0)    # "": had no stream there
    return replace(features, codes=codes, lacks=lacks, hash=found, split=split), L, wide


# ---- A made-up world -----------------------------------------------------------------------------

def planted_streams(n=6000, dims=None, seed=42):
    """Streams whose concepts are known: the truth that tests use.

    A sample is a sparse non-negative mixture of concepts: one family is the theme, some concepts
    come from it, some from anywhere, frequent ones more often. Every stream (dims: name -> width)
    shows the concepts it sees through its own random unit vectors, bends the result slightly (tanh)
    and adds its own level of noise. Each stream alone sees two concepts, and is blind to two more.

    Returns Features: labels (n, C) bool are the active concepts, `parents` the taxonomy (world >
    kingdom > family > concept), `truth` the concepts' directions; 80 % train, 20 % val."""
    dims = dims or {"vision": 64, "text": 48, "sound": 40}
    rng = np.random.default_rng([seed, 3])
    leaves = [a + b + c for a in "ABCD" for b in "123" for c in "abcd"]
    parents = {"world": None}
    for leaf in leaves:                                      # world > A > A1 > A1a
        parents |= {leaf[0]: "world", leaf[:2]: leaf[0], leaf: leaf[:2]}
    C, M = len(leaves), len(dims)
    frequency = rng.permutation(1 / (1 + np.arange(C) / 8))  # from 1 down to 1/7
    seen = np.ones((C, M), bool)
    special = rng.permutation(C)[:4 * M].reshape(M, 2, 2)
    for m in range(M):
        seen[special[m, 0]] = np.arange(M) == m              # private to stream m
        if M > 1:
            seen[special[m, 1], m] = False                   # stream m is blind to these
    labels = np.zeros((n, C), bool)
    theme = rng.integers(C // 4, size=n)
    for i in range(n):
        p = frequency * np.where(np.arange(C) // 4 == theme[i], 8., 1.)    # four a family
        labels[i, rng.choice(C, size=rng.integers(2, 6), replace=False, p=p / p.sum())] = True
    amount = labels * rng.uniform(0.5, 1.5, size=(n, C))     # (n, C), 0 where a concept is absent
    streams, truth = {}, {}
    for m, (s, d) in enumerate(dims.items()):
        D = rng.standard_normal((C, d))                      # one direction a concept
        D *= seen[:, m:m + 1] / np.linalg.norm(D, axis=1, keepdims=True)
        noise = (0.05, 0.1, 0.15)[m % 3] / d ** 0.5 * rng.standard_normal((n, d))
        streams[s], truth[s] = (np.tanh(amount @ D) + noise).astype(np.float32), D
    return _scan(Features(streams, split=_split(None, None, n, seed), labels=labels,
                          label_names=leaves, parents=parents, truth=truth))


# ---- A made-up tissue: images whose truth is known -----------------------------------------------

# name, lineage, cell radius (of a 64-pixel image), nucleus; cytoplasm, granules and cut, if any. A
# nucleus is made of discs (radius, x, y, stretch), in radii of the cell, that are joined, less the
# disc `cut`.
LOBES = [(.378, .48 * math.cos(a), .48 * math.sin(a)) for a in (0.3, 2.2, 4.4)]
CELLS = (("lymphocyte", "lymphoid", (5.5, 7.), [(.82,)], (178, 190, 230)),
         ("plasma cell", "lymphoid", (7.5, 9.), [(.5, .38)], (168, 132, 200)),
         ("neutrophil", "myeloid", (7.5, 9.), LOBES, (244, 218, 228)),
         ("eosinophil", "myeloid", (7.5, 9.), [(.42, -.42), (.42, .42)], (250, 200, 190),
          (214, 62, 40)),
         ("monocyte", "myeloid", (8.5, 10.5), [(.75,)], (176, 186, 212), None, (.4125, .5625)),
         ("fibroblast", "stromal", (9., 12.), [(.3, 0, 0, 3.2)]),
         ("tumour cell", "epithelial", (9.5, 12.), [(.66,)], (222, 160, 205)),
         ("goblet cell", "epithelial", (9., 11.), [(.95,)], (246, 248, 252), None, (.9025, -.38)),
         ("mitosis", "epithelial", (9., 11.), [(.22, 0, 0, 3.)], (226, 180, 214)))
GROUNDS = ("pale stroma", "fibres", "vacuoles")
DISEASES = {"healthy": (4, 1, 2, 1, 2, 5, 0, 3, .1),         # how often it shows each of the CELLS
            "infection": (2, 3, 8, 1, 3, 3, 0, 2, .2),
            "allergy": (2, 2, 1, 8, 2, 3, 0, 3, .1),
            "carcinoma": (2, 1, 1, 1, 1, 3, 8, 2, 1.5)}


def tissue(n, size=64, seed=0):
    """Microscope-like fields with known truth: `n` uint8 images of `size` pixels, one to four cells
    of nine kinds each. A patient's images come from two slides, which differ in stain and focus; a
    patient's disease shifts the mix of cells. The same seed gives the same bytes. Returns a dict:
        pixels (n, size, size, 3), captions (n,)
        labels (n, C) bool with label_names: the kinds, mucin and the three grounds
        parents: taxonomy, specimen > cell > lineage > kind, specimen > tissue > ground or mucin
        instances (n, size, size): 0, or 1 + the number of the object on top
        boxes (m, 6): as in a feature file, an image's objects in the order of their numbers
        groups, slides (n,), disease (n,) with disease_names
        split (n,): of each disease 30 % of the patients, at least one, are `test`"""
    rng = np.random.default_rng([seed, 20])
    patients = max(8, n // 20)
    of = np.sort(np.arange(n) % patients)                    # (n,) whose image it is
    illness = np.arange(patients) % len(DISEASES)            # (patients,)
    slides = 2 * of + rng.integers(2, size=n)
    weights = np.array(list(DISEASES.values()), float)
    share = (weights / weights.sum(1, keepdims=True)).cumsum(1)[illness[of]]    # (n, kinds)
    count = rng.integers(1, 5, n)                            # cells of an image
    kind = (rng.random((n, 4, 1)) > share[:, None]).sum(2).clip(max=len(CELLS) - 1)
    ground = rng.integers(len(GROUNDS), size=n)
    mucin = rng.random(n) < np.where(illness[of] == 3, .2, .04)
    image, instances = _draw_fields(n, size, ground, mucin, kind, count, rng)
    kinds = [[len(CELLS)] * int(mucin[i]) + kind[i, :count[i]].tolist() for i in range(n)]
    labels, boxes = np.zeros((n, len(CELLS) + 1 + len(GROUNDS)), bool), []
    for i, found in enumerate(kinds):
        labels[i, [*found, len(CELLS) + 1 + ground[i]]] = True
        for k, place in zip(found, scipy.ndimage.find_objects(instances[i], len(found))):
            if place:                                        # what is hidden has none
                y, x = place
                boxes.append((i, k, x.start, y.start, x.stop, y.stop))
    test = np.zeros(patients, bool)
    for d in range(len(DISEASES)):
        mine = rng.permutation(np.flatnonzero(illness == d))
        test[mine[:max(1, round(.3 * len(mine)))]] = True
    beside = ("mucin", *GROUNDS)
    parents = {"specimen": None, "cell": "specimen", "tissue": "specimen",
               **dict.fromkeys(sorted({c[1] for c in CELLS}), "cell"),
               **{c[0]: c[1] for c in CELLS}, **dict.fromkeys(beside, "tissue")}
    pixels = _stain(image, slides, rng)
    captions = [_caption(kind[i, :count[i]], ground[i], mucin[i], rng) for i in range(n)]
    return {"pixels": pixels, "labels": labels, "captions": np.array(captions),
            "label_names": np.array([*(c[0] for c in CELLS), *beside]), "parents": parents,
            "instances": instances, "boxes": np.array(boxes, float) / ([1, 1] + [size] * 4),
            "groups": of, "slides": slides, "disease": illness[of],
            "disease_names": np.array(list(DISEASES)), "split": np.where(test[of], "test", "train")}


def tissue_files(made):
    """What `tissue` made by the name of the file that it becomes: pictures (h, w, 3) as .png, those
    of a patient also as a slide of four columns in folders of split and disease, dicts of arrays as
    .npz, of which patients.npz has the diseases as labels, and the taxonomy as .json."""
    names = np.array([f"images/{i:05d}.png" for i in range(len(made["pixels"]))])
    files = dict(zip(names.tolist(), made["pixels"]))
    for group, row in zip(*np.unique(made["groups"], return_index=True)):
        disease = made["disease_names"][made["disease"][row]]
        pictures = torch.from_numpy(made["pixels"][made["groups"] == group]).movedim(3, 1)
        slide = vision().utils.make_grid(pictures, 4, padding=0, pad_value=255)
        name = f"slides/{made['split'][row]}/{disease}/{group:04d}.png"
        files[name] = slide.movedim(0, 2).numpy()
    kept = {key: v for key, v in made.items() if key not in ("pixels", "parents")}
    about = {key: made[key] for key in ("groups", "split", "captions")}
    return {**files, "tissue.npz": {**kept, "images": names}, "taxonomy.json": made["parents"],
            "patients.npz": {"images": names, "labels": made["disease"],
                             "label_names": made["disease_names"], **about}}


def _cloud(n, size, cells, rng):
    """Smooth noise (n, size, size), about N(0, 1) at each of cells x cells points, interpolated."""
    coarse = torch.from_numpy(rng.standard_normal((n, 1, cells, cells), dtype=np.float32))
    resize = torch.nn.functional.interpolate
    return resize(coarse, (size, size), mode="bicubic", align_corners=True)[:, 0].numpy()


def _circles(n, middle, radius, rng):
    """n random circles: x and y of their middles and their radii, each (n, 1, 1)."""
    return (rng.uniform(*span, (n, 1, 1)).astype(np.float32) for span in (middle, middle, radius))


def _draw_fields(n, size, ground, mucin, kind, count, rng):
    """Images (n, size, size, 3) float32, and which object is on top in each pixel."""
    image, f = _draw_grounds(n, size, ground, rng), size / 64
    instances = np.zeros((n, size, size), np.uint8)
    instances[mucin] = _mucin(image, mucin, size, rng)
    quarter = rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1)        # one for each cell
    middle = np.stack([quarter % 2, quarter // 2], -1) * 32 + 16 + rng.uniform(-4, 4, (n, 4, 2))
    for slot in range(4):
        for k, cell in enumerate(CELLS):
            rows = np.flatnonzero((kind[:, slot] == k) & (slot < count))
            number = 1 + mucin[rows] + slot
            _draw_cells(image, instances, rows, cell, middle[rows, slot] * f, number, f, rng)
    return image, instances


def _draw_grounds(n, size, ground, rng):
    """Empty tissue, float32 (n, size, size, 3): stroma, fibres in one direction, fat vacuoles."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    base = np.array([(240, 222, 232), (236, 196, 214), (238, 212, 224)], np.float32)[ground]
    noise = 4 * _cloud(n, size, 9, rng) + 2 * rng.standard_normal((n, size, size), np.float32)
    image = base[:, None, None] + noise[..., None]           # (n, size, size, 3)
    rows = np.flatnonzero(ground == 1)
    angle, phase = rng.uniform(0, 3, (2, len(rows), 1, 1)).astype(np.float32)    # of the fibres
    wave = np.cos(angle) * x + np.sin(angle) * y + np.float32(.02) * _cloud(len(rows), size, 5, rng)
    dark = 9 + 9 * np.sin(np.float32(50) * wave + 2 * phase)
    image[rows] -= dark[..., None] * np.array((.3, 1, .7), np.float32)
    rows = np.flatnonzero(ground == 2)
    fat = image[rows]
    for _ in range(4):
        cx, cy, r = _circles(len(rows), (0, 1), (.07, .15), rng)
        d = (r - np.sqrt((x - cx) ** 2 + (y - cy) ** 2))[..., None] * size    # pixels inside it
        inside, rim = np.clip(d, 0, 1), np.clip(1 - abs(d) / 1.5, 0, 1)
        fat += inside * (250 - fat) - rim * np.array((40, 70, 50), np.float32)
    image[rows] = fat
    return image


def _mucin(image, mucin, size, rng):
    """Paint a pale blue pool into the images `mucin` (n,) bool; returns where, of 0 and 1."""
    rows = np.flatnonzero(mucin)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    cx, cy, r = _circles(len(rows), (.3, .7), (.25, .35), rng)
    edge = r * (1 + .15 * _cloud(len(rows), size, 5, rng))   # a radius in each direction
    alpha = np.clip((edge - np.hypot(x - cx, y - cy)) * size / 3, 0, 1)
    blue = np.array((176, 206, 230), np.float32) + 6 * _cloud(len(rows), size, 12, rng)[..., None]
    image[rows] += (.8 * alpha)[..., None] * (blue - image[rows])
    return (alpha > .5).astype(np.uint8)


def _draw_cells(image, instances, rows, cell, middle, number, f, rng):
    """Paint a cell at `middle` (x, y) into each of the images `rows`, its number in `instances`."""
    name, _, radii, discs, cytoplasm, granules, cut = (*cell, None, None, None)[:7]
    m, size, half = len(rows), image.shape[1], int(np.ceil(14 * f))
    r = (rng.uniform(*radii, m) * f).astype(np.float32)[:, None, None]
    corner, step = np.round(middle).astype(int) - half, np.arange(2 * half)
    py, px = corner[:, 1, None, None] + step[:, None], corner[:, 0, None, None] + step
    angle = rng.uniform(0, 2 * np.pi, m).astype(np.float32)[:, None, None]
    cx, cy = middle.T[..., None, None]                       # (m, 1, 1) each
    dx, dy = (px - cx).astype(np.float32), (py - cy).astype(np.float32)    # (m, 1, w), (m, w, 1)
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    rough = 1 + .06 * _cloud(m, 2 * half, 6, rng)            # no disc is quite round

    def disc(radius, x=0, y=0, stretch=1):
        return np.clip(radius * r * rough - np.hypot((u - x * r) / stretch, v - y * r) + .5, 0, 1)
    dark = np.maximum.reduce([disc(*d) for d in discs])
    if cut:
        dark = dark * (1 - disc(*cut))
    body = dark if cytoplasm is None else disc(1)            # (m, w, w), share of each pixel
    inside = (py >= 0) & (py < size) & (px >= 0) & (px < size)
    y, x, i = np.clip(py, 0, size - 1), np.clip(px, 0, size - 1), rows[:, None, None]
    window = image[i, y, x]                                  # (m, w, w, 3), a copy
    if cytoplasm is not None:
        tint = np.array(cytoplasm, np.float32) + 4 * _cloud(m, 2 * half, 8, rng)[..., None]
        window += body[..., None] * (tint - window)
    if granules is not None:
        spots = body * (1 - dark) * (rng.random(body.shape) < .4)
        window += .85 * spots[..., None] * (np.array(granules, np.float32) - window)
    chromatin = np.array((92, 48, 140), np.float32) * (.62 if name == "mitosis" else 1)
    chromatin = chromatin + 14 * _cloud(m, 2 * half, 12, rng)[..., None]
    window += .95 * dark[..., None] * (chromatin - window)
    if name == "tumour cell":                                # a nucleolus
        window += .8 * disc(.2, .2)[..., None] * (np.array((60, 14, 80), np.float32) - window)
    # each pixel once: clipped ones, outside, would repeat the rim
    y, x, i = (np.broadcast_to(v, body.shape) for v in (y, x, i))
    take = inside & (body > .02)
    image[i[take], y[take], x[take]] = window[take]
    take = inside & (body > .5)
    instances[i[take], y[take], x[take]] = np.broadcast_to(number[:, None, None], body.shape)[take]


def _stain(image, slides, rng):
    """Each slide's own dye strengths, brightness and focus: float images -> uint8."""
    out = np.empty(image.shape, np.uint8)
    for slide in np.unique(slides):
        rows, blur = slides == slide, rng.uniform(0, 1.)
        dye = (rng.uniform(.8, 1.25, 3) * rng.uniform(.85, 1.15)).astype(np.float32)
        part = image[rows]
        if blur > .3:
            part = scipy.ndimage.gaussian_filter(part, (0, blur, blur, 0))
        out[rows] = (255 * (np.clip(part, 1, 255) / 255) ** dye).astype(np.uint8)
    return out


def _caption(kinds, ground, mucin, rng):
    """A sentence on a field, from a small grammar; about a fifth of the facts go unsaid."""
    def pick(*options):
        return options[rng.integers(len(options))]
    found = []
    for k, many in Counter(kinds.tolist()).items():
        name = CELLS[k][0]
        numbers = "an" if name[0] == "e" else "a", "two", "three", "four"
        plural = "mitoses" if name == "mitosis" else name + "s"
        if rng.random() < .85:
            number = pick(numbers[many - 1], "one" if many == 1 else "several")
            found.append(f"{number} {name if many == 1 else plural}")
    if mucin and rng.random() < .85:
        found.append(pick("mucin", "a pool of mucin"))
    place = ("pale stroma", "fibrous stroma", "fat vacuoles")[ground]
    where = f" {pick('in', 'within', 'on')} {place}"
    *first, last = found or [pick("a field", "tissue")]
    text = f"{', '.join(first)} and {last}" if first else last
    start = pick("", "", "a field with ", "microscopy of ")
    return start + text + (where if rng.random() < .7 else "")


# ---- Words ---------------------------------------------------------------------------------------

class Words:
    """A word-level tokenizer: 0 pads, words count from 1 in alphabetical order, then `start` and,
    highest, `end`. words: the vocabulary, or None to take what stands in two `captions` or more."""
    word = r"[\w']+"                                         # its pattern

    def __init__(self, captions=None, words=None):
        if words is None:
            seen = Counter(word for text in captions for word in {*self.split(text)})
            words = sorted(word for word, n in seen.items() if n > 1)
        refuse(not words, "no word stands in two captions - give more captions")
        self.words = list(words)
        self.number = {w: i + 1 for i, w in enumerate(self.words)}
        self.start, self.end, self.size = len(words) + 1, len(words) + 2, len(words) + 3

    @classmethod
    def split(cls, text):
        return re.findall(cls.word, str(text).lower())

    def pieces(self, text, strict=True):
        """[(token, (number of the word, word))] of a text; unknown words, unless `strict`, go."""
        words = self.split(text)
        unknown = [w for w in words if w not in self.number]
        if strict and unknown:
            raise InputError(f"the word '{unknown[0]}' is in no caption learned from - use others")
        return [(self.number[w], (i, w)) for i, w in enumerate(words) if w in self.number]

    def __call__(self, texts, context, strict=True):
        """(n, context) int64: start, words, end, zeros; too long a text loses its last words."""
        out = torch.zeros(len(texts), context, dtype=torch.int64)
        for i, text in enumerate(texts):
            tokens = [token for token, _ in self.pieces(text, strict)[:context - 2]]
            out[i, :len(tokens) + 2] = torch.tensor([self.start, *tokens, self.end])
        return out


class Merges(Words):
    """CLIP's own tokenizer: a word starts as its bytes, and of neighbours the pair that stands
    first in the list is merged, again and again (byte-pair encoding, Sennrich et al. 2016).

    merges: list of pairs "a b". Tokens: 256 bytes, the same at the end of a word, merges, start,
    end. Letters are Python's, not Unicode's L; broken text is not mended first (CLIP's ftfy)."""
    word = r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+"

    def __init__(self, merges):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [b for b in range(256) if b not in printable]             # letters from 256 on
        self.letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
        pairs = [tuple(line.split()) for line in merges]
        refuse(not pairs or any(len(pair) != 2 for pair in pairs),
               "a merges file has two pieces a line - give CLIP's bpe_simple_vocab")
        letters = [*self.letter.values()]
        names = [*letters, *(v + "</w>" for v in letters), *map("".join, pairs)]
        self.words, self.rank = list(merges), {pair: i for i, pair in enumerate(pairs)}
        self.number = {name: i for i, name in enumerate(names)}
        self.start, self.end, self.size = len(names), len(names) + 1, len(names) + 2

    def merged(self, word):
        """The pieces of a word."""
        pieces = [self.letter[b] for b in word.encode()]     # a letter a byte
        pieces[-1] += "</w>"
        while True:
            ranks = [self.rank.get(pair, math.inf) for pair in zip(pieces, pieces[1:])]
            if min(ranks, default=math.inf) == math.inf:
                return pieces
            i = ranks.index(min(ranks))
            pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]

    def pieces(self, text, strict=True):
        return [(self.number[piece], (i, word)) for i, word in enumerate(self.split(text))
                for piece in self.merged(word)]


def read_merges(path):
    """The merges of CLIP's bpe_simple_vocab_16e6.txt, plain or gzipped: lines 2 to 48,895."""
    opened = gzip.open if path.endswith(".gz") else open
    with reading(path, "merges file"), opened(path, "rt", encoding="utf-8") as f:
        return f.read().splitlines()[1:48895]


def read_open_clip(path):
    """open_clip's config: whether its GELU is OpenAI's, and its pixels' mean, deviation (2, 3)."""
    with reading(path, "config of a CLIP with heads of 64"):
        whole = read_json(path)
        told, seen = whole["model_cfg"], whole.get("preprocess_cfg", {})
        pixels = [seen.get(key, usual) for key, usual in zip(("mean", "std"), CLIP_PIXELS)]
        told = {"quick_gelu": False, **told, **told.get("vision_cfg", {})}
        if told["quick_gelu"] not in (True, False) or told.get("head_width", 64) != 64:
            raise ValueError("GELU or heads")
        return told["quick_gelu"], np.array(pixels, float).reshape(2, 3)


def latent_semantics(captions, known, longest=1, width=32):
    """Latent semantic analysis (Deerwester et al. 1990): a text encoder that never saw a picture.

    Counts of words, and of runs of up to `longest` of them, in the rows `known`, times the log of
    their rarity, scaled to length 1, on these rows' first right singular vectors (N, width)."""
    grams = [[" ".join(words[i:i + n]) for n in range(1, longest + 1)
              for i in range(len(words) - n + 1)] for words in map(Words.split, captions)]
    number = {gram: j for j, gram in enumerate(sorted({gram for i in known for gram in grams[i]}))}
    refuse(len(number) < 2 or len(known) < 2,
           "the captions to learn from hold fewer than two words - give more")
    cells = [(i, number[gram]) for i, found in enumerate(grams) for gram in found if gram in number]
    shape = len(grams), len(number)
    counts = scipy.sparse.csr_matrix((np.ones(len(cells)), tuple(zip(*cells))), shape)
    counts = counts.multiply(np.log(len(known) / (counts[known] > 0).sum(0)) + 1).tocsr()    # idf
    length = np.maximum(scipy.sparse.linalg.norm(counts, axis=1), 1e-12)
    counts = scipy.sparse.diags(1 / length) @ counts
    cap = min(len(number), len(known))
    _, values, axes = scipy.sparse.linalg.svds(counts[known], min(width, cap - 1), v0=np.ones(cap))
    axes = axes[values > 1e-6 * values.max()][::-1]          # beyond the rank any vector would do
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])
    return (counts @ (axes * signs[:, None]).T).astype(np.float32)     # signs: always the same


def colours(pixels):
    """Roots (N, 64) of the shares that 64 colours have in each of pictures (N, h, w, 3) uint8."""
    kind = pixels // 64 @ np.array([16, 4, 1], np.uint8)     # (N, h, w): of R, G, B two bits each
    counts = np.stack([np.bincount(one.ravel(), minlength=64) for one in kind])
    return np.sqrt(counts / kind[0].size).astype(np.float32)


# ---- Images, and DINO's crops of them (thesis 3.2.1; Caron et al. 2021, section 3) ---------------

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # mean and std of R, G, B in 0..1
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
SLIDES = (*PICTURES, ".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".bif")


@functools.cache
def vision():
    """torchvision, imported late. A CUDA build of it beside a CPU build of torch cannot be imported
    for want of two operators, which nothing here needs: then they are declared first."""
    try:
        import torchvision.transforms
    except RuntimeError:
        for name in ("torchvision::nms", "torchvision::qnms"):
            torch.library.define(name, "(Tensor dets, Tensor scores, float limit) -> Tensor")
        import torchvision.transforms
    return torchvision


@dataclass
class Images(Samples):
    """Pictures and what is known about them: all as a feature file has it, except that `about` has
    `images` only where they are pixels. With `coords` a picture is that part of its file.

    paths   list of N files
    side    pixels that a part needs, at least, where a slide has levels
    window  see `as_rgb`
    outlines  of each [(label, COCO's outline, (width, height))], or (h, w): its box on top"""
    paths: list
    side: int = 224
    window: tuple = None
    outlines: list = None

    def open(self, i):
        """Picture i in RGB."""
        if "coords" in self.about:
            return _slide(self.paths[i], self.window).read(self.about["coords"][i], self.side)
        return open_image(self.about.get("images", self.paths)[i], window=self.window)

    def __len__(self):
        return len(self.paths)

    def masks(self, i):
        """{label: (h, w) bool}: where picture i shows it, all its objects together."""
        found, told, size = {}, self.outlines[i], self.open(i).size
        if isinstance(told, np.ndarray):                     # what is hidden has no pixel, no box
            labels = self.boxes[self.boxes[:, 0] == i, 1].astype(int).tolist()
            masks = [(c, told == number) for c, number in zip(labels, np.setdiff1d(told, 0))]
        else:
            with reading(self.paths[i], "picture with outlines"):
                masks = [(c, _outline(outline, side, size)) for c, outline, side in told]
        for label, mask in masks:
            if mask.any():
                found[label] = found.get(label, False) | mask
        return found

    def rows(self, *splits):
        """Those of the splits; all, where there is no split."""
        inside = np.ones(len(self)) if self.split is None else np.isin(self.split, splits)
        return np.flatnonzero(inside)

    def views(self, rows, size, whole=False):
        """What a backbone sees of the pictures `rows`, see `plain_view`: (n, 3, size, size)."""
        # tiles have no margin, boxes are shares of all
        view = plain_view(size, whole or "coords" in self.about or self.boxes is not None)
        self.side = max(size, self.side)                     # slides are read at that level
        return torch.stack([view(self.open(i)) for i in rows])

    @torch.no_grad()
    def blocks(self, rows, backbone, size, block=256, whole=False, **how):
        """Features (n, d) of the pictures `rows`, tokens (n, T, d) in half precision, block after
        block; without a backbone the pixels themselves. how: see `features` of the backbone."""
        for start in range(0, len(rows), block):
            out = self.views(rows[start:start + block], size, whole)
            if backbone is not None:
                out = backbone.features(out.to(next(backbone.parameters()).device), **how)
            out = out[0].half() if isinstance(out, tuple) else out.flatten(1)    # tokens, grid
            yield out.cpu().numpy()

    def features(self, *which, **how):
        """All of `blocks` in one array."""
        return np.concatenate([*self.blocks(*which, **how)])

    def take(self, rows):
        """The pictures `rows`, which may repeat, without boxes and masks of what is in them."""
        own = _fields({key: a[rows] for key, a in self.each().items()})
        return replace(self, paths=[self.paths[i] for i in rows], boxes=None, outlines=None, **own)

    def balanced(self, seed):
        """As many pictures of every label, in each split, as there are of its rarest, drawn by lot
        (thesis Table 3.3)."""
        y, split = self.labels, np.zeros(len(self)) if self.split is None else self.split
        refuse(np.ndim(y) != 1, "--balanced needs one label for each picture - leave it out")
        rng, kept = np.random.default_rng([seed, 14]), []
        for part in np.unique(split):
            there = [np.flatnonzero((split == part) & (y == c)) for c in np.unique(y[y >= 0])]
            refuse(not all(map(len, there)), f"--balanced, but no {part} picture of some label")
            kept += [rng.permutation(rows)[:min(map(len, there))] for rows in there]
        return self.take(np.sort(np.concatenate(kept)))

    def each(self):
        """What there is for each picture, by key."""
        found = {"labels": self.labels, "mask": self.mask, "split": self.split, **self.about}
        return {key: a for key, a in found.items() if a is not None}

    def arrays(self, out):
        """What is known about the pictures, as the feature file `out` has it."""
        here = os.path.dirname(os.path.abspath(out))
        found = {"images": np.array([os.path.relpath(p, here) for p in self.paths]), **self.each()}
        found["label_names"] = None if self.labels is None else np.array(self.label_names)
        return {key: a for key, a in {**found, "boxes": self.boxes}.items() if a is not None}

    def knn_rows(self, seed, most):
        """Pictures that vote and that are judged, up to `most`: train and rest, else 80 / 20."""
        rng = np.random.default_rng([seed, 8])
        train = _split(self.split, self.about.get("groups"), len(self), seed) == "train"
        return [np.sort(rng.permutation(np.flatnonzero(part))[:most]) for part in (train, ~train)]

    @property
    def hash(self):
        """Changes with the files' names, their folders' and sizes, not with where they all lie."""
        told = [f"{os.path.join(*p.split(os.sep)[-2:])} {os.path.getsize(p)}" for p in self.paths]
        inside = [self.about[key] for key in ("coords", "images") if key in self.about]
        return _digest(np.frombuffer("\n".join(told).encode(), np.uint8), *inside)


def _fields(known):
    """Arrays of `Images.each` as the fields of `Samples` that hold them."""
    return {key: known.pop(key, None) for key in ("labels", "mask", "split")} | {"about": known}


def _digest(*arrays):
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


def read_images(path):
    """A folder of pictures, or of one level of class folders, perhaps inside train, val and test
    folders; a single large picture, which is cut into tiles (`tile_slide`'s defaults); an .npz of
    tiles as the `tile` command writes it, or a folder of such; an .npz with `images` and other keys
    of a feature file, as `tissue` writes it; a MedMNIST .npz (train_images, train_labels, ...); or
    a folder as Pascal VOC or COCO has it, with its splits and its objects. Every file but a slide's
    is opened to see that it is a picture, and none is decoded."""
    tiles = sorted(f for f in os.listdir(path) if f.endswith(".npz")) if os.path.isdir(path) else []
    if tiles:
        return _read_tiles([os.path.join(path, f) for f in tiles])
    if os.path.isfile(path) and not os.fspath(path).endswith(".npz"):
        if min(_slide(path).size) < 448:                     # hardly two tiles: one picture
            return Images([path])
        boxes, _ = tile_slide(path)
        return Images([path] * len(boxes), about={"coords": boxes})
    if os.path.isdir(os.path.join(path, "ImageSets", "Main")):
        return _annotated(path, [*_voc(path)])
    coco = sorted(pathlib.Path(path).glob("annotations/instances_*.json"))
    listed = os.fspath(path).endswith(".npz")
    found = _read_coco(path, coco) if coco else \
        _read_listed(path) if listed else _walk(path, PICTURES, "pictures")
    for file in found.paths if not {"images", "coords"} & {*found.about} else ():
        open_image(file, decode=False)
    return found


def _read_listed(path):
    """Pictures that an .npz holds in `images`, or names there, relative to itself, with what else
    it says of them. With `coords` they are tiles. What a MedMNIST file has for each split, as in
    train_images and train_labels, stands for its `images`, `labels` and `split`."""
    arrays = Source(path)
    there = [s for s in SPLITS if f"{s}_images" in arrays and f"{s}_labels" in arrays]
    if there:
        with reading(path, "MedMNIST file"):
            images, labels = ([arrays[f"{s}_{key}"] for s in there] for key in ("images", "labels"))
            size, known = [len(x) for x in images], [len(y) for y in labels]
            if size != known:
                raise ValueError(f"{known} labels of {size} images")
            arrays.made = {"images": np.concatenate(images), "labels": np.concatenate(labels),
                           "split": np.repeat(there, size)}
    refuse("images" not in arrays, f"{path} lacks 'images' - give a list of pictures or tiles, a "
           "MedMNIST .npz, or class folders")
    n = len(np.atleast_1d(arrays["images"]))
    refuse(not n, f"{path} has empty 'images' - name another file")
    told, here, paths = _told(arrays, n), os.path.dirname(os.path.abspath(path)), [path] * n
    about = told["about"]
    if about["images"].ndim == 1:
        paths = [os.path.join(here, p) for p in about.pop("images")]
    elif "coords" in about:
        raise InputError(f"'images' has shape {about['images'].shape} beside 'coords' - give paths")
    return Images(paths, **told)


def _voc(folder, window=None):
    """Yield (split, path, objects, (width, height), name) of what a Pascal VOC folder lists."""
    for part, split in (("trainval", "train"), ("test", "test")):
        path = os.path.join(folder, "ImageSets", "Main", f"{part}.txt")
        refuse(not os.path.exists(path),
               f"no {path} - expected a Pascal VOC folder with JPEGImages")
        with reading(path, "list"), open(path, errors="replace") as f:
            stems = f.read().split()
        for stem in stems:
            plain_name(stem, f"{path} lists a picture")
            picture = os.path.join(folder, "JPEGImages", f"{stem}.jpg")
            objects = read_voc(os.path.join(folder, "Annotations", f"{stem}.xml"))
            yield split, picture, objects, np.array(_slide(picture, window).size), stem


def read_voc(path):
    """The objects of a Pascal VOC annotation: list of (name, box (4,): x0, y0, x1, y1)."""
    sides = [f"bndbox/{k}" for k in ("xmin", "ymin", "xmax", "ymax")]
    with reading(path, "Pascal VOC annotation"):
        found = [(thing.find("name").text, np.array([float(thing.find(k).text) for k in sides]))
                 for thing in ElementTree.parse(path).iter("object")]
    for name, box in found:
        plain_name(name, f"{path} names an object")
        refuse(not np.isfinite(box).all(),
               f"{path} has the box {box.tolist()} of '{name}' - give finite numbers")
    return found


def _annotated(folder, listed, names=None):
    """Images of (split, path, objects, (width, height), ...) each; the objects, (name, box x0, y0,
    x1, y1 in pixels, ...), as labels and boxes; of `names`, or of all that there are."""
    refuse(not listed, f"{folder} lists no pictures - add some")
    splits, paths, found, sizes, *_ = map(list, zip(*listed))
    objects = [(i, name, *(box / [*size, *size]).clip(0, 1).tolist())
               for i, (things, size) in enumerate(zip(found, sizes)) for name, box, *_ in things]
    objects = [(i, name, *box) for i, name, *box in objects if box[0] < box[2] and box[1] < box[3]]
    names = names or sorted({name for _, name, *_ in objects})
    boxes = np.reshape([(i, names.index(name), *box) for i, name, *box in objects], (-1, 6))
    labels = np.zeros((len(paths), len(names)), bool)
    labels[tuple(boxes[:, :2].astype(int).T)] = True
    return Images(paths, split=np.array(splits), labels=labels, label_names=names, boxes=boxes)


def _read_coco(folder, files):
    """The pictures that COCO's instances_PART.json list in folders PART: objects as labels, boxes,
    masks; first captions, if any; splits, if several PARTs begin with their names."""
    listed, names = [], []
    for file in files:
        part, own = file.stem.removeprefix("instances_"), {}
        beside = file.with_name(f"captions_{part}.json")
        told, texts = read_json(file), read_json(beside) if beside.exists() else {"annotations": []}
        split = next((s for s in SPLITS if part.startswith(s)), "")
        with reading(file, "file of COCO's"):
            name_of = {one["id"]: one["name"].encode().decode() for one in told["categories"]}
            names += [name for name in name_of.values() if name not in names]
            texts = {one["image_id"]: one["caption"].encode().decode()
                     for one in texts["annotations"][::-1]}
            for one in told["images"]:
                path = os.path.join(folder, part, one["file_name"])
                size = int(one["width"]), int(one["height"])
                own[one["id"]] = split, path, [], size, texts.get(one["id"], "")
            for one in told["annotations"]:                  # crowds, too, as the authors
                x, y, w, h = np.asarray_chkfinite(one["bbox"], float)
                thing = name_of[one["category_id"]], np.array([x, y, x + w, y + h])
                own[one["image_id"]][2].append((*thing, one["segmentation"]))
        listed += own.values()
    out, captions = _annotated(folder, listed, names), np.array([v[-1] for v in listed])
    out.outlines = [[(names.index(name), told, size) for name, _, told in things]
                    for _, _, things, size, _ in listed]
    if (captions != "").any():
        out.about["captions"] = captions
    if not {"train"} < {*out.split} <= {*SPLITS}:
        out.split = None
    return out


def _outline(told, declared, size):
    """A mask (h, w) as COCO tells it: how long runs of 0 and of 1 are in turn, column by column
    (not packed as text), or polygons [x, y, x, y, ...], of pixels whose middle is inside."""
    width, height = size
    if tuple(declared) != size:
        raise ValueError(f"it has {size} pixels, not {declared}")
    if isinstance(told, dict):
        runs = np.array(told["counts"], int)
        if told["size"] != [height, width] or runs.sum() != height * width:
            raise ValueError(f"runs of {told['size']}")
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    mask, middle = np.zeros((height, width), bool), np.arange(height)[:, None] + 0.5
    for polygon in told:
        start = np.asarray_chkfinite(polygon, float).reshape(-1, 2)
        (x, y), (right, down) = start.T, (np.roll(start, -1, 0) - start).T    # (n,) each: of edges
        row, edge = np.nonzero((y <= middle) != (y + down <= middle))        # that it crosses
        at = x[edge] + (row + 0.5 - y[edge]) * right[edge] / down[edge]
        crossed = np.zeros((height, width + 1), int)
        np.add.at(crossed, (row, np.ceil(at - 0.5).clip(0, width).astype(int)), 1)
        mask |= crossed[:, :-1].cumsum(1) % 2 == 1           # to the right of an odd number
    return mask


def _files(folder, endings):
    """[(folders inside, path)] of what has one of the endings, at any depth, through links. Left
    out is what is none of the user's: .ipynb_checkpoints, ._x.png, __MACOSX."""
    found = []
    for where, inside, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(where, name)) for name in inside}
        inside[:] = [name for name in sorted(inside) if not name.startswith((".", "__MACOSX"))
                     and os.path.commonpath([real[name], os.path.realpath(where)]) != real[name]]
        found += [(pathlib.Path(where).relative_to(folder).parts, os.path.join(where, f))
                  for f in sorted(files) if f.lower().endswith(endings) and f[0] != "."]
    return found


def _walk(folder, endings, what):
    """The files of a folder laid out as `read_images` says, as Images; only masks are opened."""
    refuse(not os.path.isdir(folder),
           f"no folder {folder} - name one of {what}, or of class folders of {what}")
    split_of = {**{s: s for s in SPLITS}, "valid": "val", "validation": "val"}
    parted = any(os.path.isdir(os.path.join(folder, s)) for s in SPLITS)
    files, found, masks = _files(folder, endings), [], {}    # masks: of a picture's stem
    stems = {os.path.splitext(path)[0] for _, path in files}
    for under, path in files:
        # a segmentation beside its picture, as in BUSI, where it would tell the class
        picture = re.fullmatch(r"(.+)_mask(_\d+)?\.[^.]+", path, re.DOTALL)
        if picture and picture[1] in stems and path.lower().endswith(PICTURES):
            masks.setdefault(picture[1], []).append(path)
            continue
        refuse(parted and (not under or under[0] not in split_of),
               f"{path} lies beside the train, val and test folders - move it")
        refuse(len(under) > parted + 1,
               f"{path} lies deeper than one level of class folders - move it up")
        found.append((path, split_of[under[0]] if parted else "", "".join(under[parted:])))
    refuse(not found, f"no {what} in {folder} - expected {', '.join(endings)}")
    paths, split, classes = map(list, zip(*found))
    names = sorted({*classes})
    if len(names) > 1 and names[0] == "":
        raise InputError(f"{paths[classes.index('')]} lies beside class folders - move it into one")
    out = Images(paths, split=np.array(split) if parted else None)
    if names != [""]:
        out.labels, out.label_names = np.array([names.index(c) for c in classes]), names
    if masks and out.labels is not None and endings is PICTURES:         # not of slides
        out.boxes = np.array([(i, out.labels[i], *box) for i, path in enumerate(paths)
                              for box in map(_mask_box, masks.get(os.path.splitext(path)[0], ()))
                              if box], float).reshape(-1, 6)
    if masks:
        out.notes.append(f"{folder}: {len(files) - len(paths)} masks (X_mask.png beside X.png) are "
                         + ("left out" if out.boxes is None else
                            "boxes of the classes; pictures are seen whole, not cut"))
    return out


def _mask_box(path):
    """The box x0, y0, x1, y1 around what is bright in a mask, of any depth, in shares, or None."""
    with reading(path, "mask"):
        x = np.asarray(Image.open(path))
    x = x if x.ndim == 2 else x[..., :3].max(2)              # not alpha
    box = Image.fromarray(x > x.max() / 2).getbbox()
    return box and tuple(np.divide(box, 2 * x.shape[::-1]))


def open_image(image, decode=True, window=None, folder=""):
    """A picture, its pixels or its path from `folder`, in RGB; without `decode` only looked at."""
    if isinstance(image, np.ndarray):
        return as_rgb(Image.fromarray(image), window)
    path = os.path.join(folder, image)
    with reading(path, "picture"):
        opened = Image.open(path)
        return as_rgb(opened, window) if decode else opened.close()


def as_rgb(image, window=None):
    """A PIL image in RGB, upright as its EXIF orientation says.

    Grey of more than 8 bits is scaled: low becomes black, high white, what lies beyond is cut off.
    They are `window`, (low, high), where it is given, which then holds for grey of 8 bits too and
    leaves colours alone; else `_grey_range`."""
    tags = dict(getattr(image, "tag_v2", {}))
    image = ImageOps.exif_transpose(image)
    if image.mode[0] not in "IF" and not (window and image.mode == "L"):
        return image.convert("RGB")
    x = np.asarray(image).astype(np.float64)                 # (H, W)
    low, high = window or _grey_range(x, tags, image.mode == "F")
    share = (np.nan_to_num(x, nan=low) - low) / (high - low) if high > low else np.zeros_like(x)
    if image.mode.startswith("I;16") and tags.get(262) == 0:     # TIFF: the least value is white
        share = 1 - share
    return Image.fromarray((255 * share.clip(0, 1)).round().astype(np.uint8)).convert("RGB")


def _grey_range(x, tags, floating=False):
    """(low, high) of a picture x (H, W), from its TIFF tags, if any.

    Of whole numbers the least and largest value it states (SMin- and SMaxSampleValue, else Min- and
    MaxSampleValue); else all that its stated bits hold, if those are fewer than 16; else the first
    of 0..4095 (12 bits in 16, as detectors have) and 0..65535 that holds all its values; else, and
    of floating numbers, its own least and largest finite value."""
    low, high = (float(np.ravel(tags.get(signed, tags.get(plain, 0)))[0])
                 for signed, plain in ((340, 280), (341, 281)))
    bits = int(np.ravel(tags.get(258, 16))[0])
    x = x[np.isfinite(x)]
    own = x.min(initial=np.inf), x.max(initial=-np.inf)
    if floating or low < high:
        return own if floating else (low, high)
    limits = (2 ** bits - 1,) if bits < 16 else (4095, 65535)
    return next(((0, most) for most in limits if 0 <= own[0] and own[1] <= most), own)


def plain_view(size, whole=False):
    """The transform for judging, Image -> (3, size, size): shorter side to 8/7 of `size`, centre
    crop, normalised. With `whole` nothing is cut off."""
    t = vision().transforms
    resize = t.Resize((size, size) if whole else round(size * 8 / 7), t.InterpolationMode.BICUBIC)
    return t.Compose([resize, t.CenterCrop(size), t.ToTensor(), t.Normalize(*IMAGENET)])


def pixel_statistics(images, rows, most=500, side=64):
    """Mean and standard deviation (3,) of R, G, B in 0..1, of pictures spread over `rows`."""
    chosen = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]
    pixels = np.stack([np.asarray(images.open(i).resize((side, side))) for i in chosen]) / 255
    return pixels.mean((0, 1, 2)), np.maximum(pixels.std((0, 1, 2)), 1e-3)


class Crops:
    """DINO's random views: `Crops(...)(image)` -> list of pictures, the two global first.

    size, local_size    sides in pixels
    scale, local_scale  share of the image's area that a crop covers
    blur       largest radius of the Gaussian blur: 2 px suits 224 px, smaller images want less
    colour     strength of colour jitter, grey and solarised views: 1 is DINO's
    All randomness comes from torch's global generator."""

    def __init__(self, size=224, local_size=96, n_local=8, scale=(0.4, 1.),
                 local_scale=(0.05, 0.4), blur=2., colour=1.):
        t = vision().transforms
        jitter = t.ColorJitter(0.4 * colour, 0.4 * colour, 0.2 * colour, 0.1 * colour)
        change = [t.RandomHorizontalFlip(), t.RandomApply([jitter], 0.8),
                  t.RandomGrayscale(0.2 * colour)]
        blurred = t.Lambda(functools.partial(random_blur, most=blur))

        def view(side, area, blur_share, *more):
            crop = t.RandomResizedCrop(side, area, interpolation=t.InterpolationMode.BICUBIC)
            return t.Compose([crop, *change, t.RandomApply([blurred], blur_share), *more])
        self.views = [view(size, scale, 1.),
                      view(size, scale, 0.1, t.RandomSolarize(128, 0.2 * colour)),
                      *[view(local_size, local_scale, 0.5)] * n_local]

    def __call__(self, image):
        return [view(image) for view in self.views]


def random_blur(image, most):
    """Gaussian blur of a random radius, from 0.1 (or `most`, if less) to `most` pixels."""
    radius = torch.empty(1).uniform_(min(0.1, most), most).item()
    return image.filter(ImageFilter.GaussianBlur(radius))


def crop_batches(images, crops, batches, seed, first, last, workers=0):
    """Of steps first .. last - 1 of `batches` over the images: a list of V tensors (B, 3, h, w)."""
    steps = [[(step, int(i)) for i in batches.rows(step)] for step in range(first, last)]
    _slide.cache_clear()                                     # workers must not share file handles
    views = functools.partial(_views, images, crops, seed)
    return iter(torch.utils.data.DataLoader(steps, None, num_workers=workers, collate_fn=views))


def _views(images, crops, seed, drawn):
    """The views of each (step, picture). By a seed of its own it is the same in a resumed run, and
    with any number of workers."""
    found = []
    for step, i in drawn:
        own = np.random.SeedSequence([seed, 7, step, i]).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(own >> 1))
            found.append(crops(images.open(i)))
    return [normalised(np.stack(each)) for each in zip(*found)]


def read_pictures(path, size, label=None, window=None):
    """Labelled pictures in memory, (N, size, size, 3) as `images` in `about`, of whatever
    `read_images` reads; those without a label are left out. Where several labels hold at once,
    `label` is the name of the one to find. window: see `as_rgb`."""
    images = replace(read_images(path), window=window)
    images, names = images.take(np.flatnonzero(images.labelled)), images.label_names
    refuse(images.labels is None,
           f"{path} has no labels - put the pictures into folders named after them")
    several = images.labels.ndim == 2
    refuse(label and not several, f"{path} has one label a picture - leave out --label")
    if several:
        refuse(label not in names, f"{path}: no label '{label}' - use --label: {', '.join(names)}")
        images.labels = images.labels[:, names.index(label)].astype(int)
        images.label_names = names = [f"no {label}", label]
    there = [names[c] for c in np.unique(images.labels)]
    refuse(len(there) < 2, f"{path} has the one class {''.join(there) or 'none'} - there is "
           "nothing to tell apart")
    views = [images.open(i).resize((size, size), Image.BICUBIC) for i in range(len(images))]
    images.about.pop("coords", None)                         # the parts are cut out now
    images.about["images"] = np.stack([np.asarray(view) for view in views])
    return images


def picture_parts(pictures, split, seed, source):
    """Rows to train on, to stop by and to report: the file's own split ("given"), or 70 / 15 / 15
    ("random"). source: the file, for messages."""
    y, groups = pictures.labels, pictures.about.get("groups")
    if split == "random":
        parts = stratified_parts(y, (70, 15, 15), seed, groups)
    elif pictures.split is None:
        raise InputError(f"{source} gives no split - use --split random")
    else:
        parts = [np.flatnonzero(pictures.split == name) for name in SPLITS]
        if not len(parts[1]):                                # none given: cut off the training part
            train, of = parts[0], None if groups is None else groups[parts[0]]
            parts[:2] = [train[rows] for rows in stratified_parts(y[train], (85, 15), seed, of)]
    C = len(pictures.label_names)
    train, stop, test = (np.bincount(y[part], minlength=C) for part in parts)    # (C,) each
    few = min(np.count_nonzero(train), np.count_nonzero(test)) < 2
    refuse(few or not stop.any() or test[train == 0].any(),
           f"{source}: {train.tolist()} pictures of the classes to train on, {stop.tolist()} to "
           f"stop by, {test.tolist()} to test on - add pictures, or use --split random")
    return parts


def normalised(pixels):
    """(N, S, S, 3) uint8 -> float tensor (N, 3, S, S), normalised as ImageNet."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / 255
    return vision().transforms.functional.normalize(x, *IMAGENET)


def jittered(x):
    """Pictures (B, 3, S, S) mirrored by chance and shifted by up to S/8, their edges repeated."""
    side, pad = x.shape[-1], x.shape[-1] // 8
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    x = torch.nn.functional.pad(x, [pad] * 4, mode="replicate")
    at = torch.randint(0, 2 * pad + 1, (len(x), 2)).tolist()    # row and column of each corner
    return torch.stack([v[:, i:i + side, j:j + side] for v, (i, j) in zip(x, at)])


# ---- Slides: tissue, tiles and regions of interest (thesis 3.2.2; CLAM, Lu et al. 2021) ----------

class Slide:
    """A large picture: by openslide, if installed, of what it knows; else by Pillow, in memory."""

    def __init__(self, path, window=None):
        self.slide = None
        with reading(path, "slide"), contextlib.suppress(ImportError, OSError):    # not installed
            import openslide
            if openslide.OpenSlide.detect_format(path):
                self.slide = openslide.OpenSlide(path)
        self.image = None if self.slide else open_image(path, window=window)
        self.size = self.slide.dimensions if self.slide else self.image.size

    def overview(self, side):
        """All of it in RGB, the longer side at most `side`, and how many pixels one then spans."""
        scale = max(1., max(self.size) / side)
        small = tuple(max(1, round(v / scale)) for v in self.size)
        return self.read((0, 0, *self.size), small[0]).resize(small, Image.BOX), scale

    def read(self, box, side=224):
        """x, y, width, height of it, from the coarsest level where that is `side` pixels wide."""
        x, y, w, h = map(int, box)
        if self.slide is None:
            return self.image.crop((x, y, x + w, y + h))
        level = self.slide.get_best_level_for_downsample(max(1., w / side))
        shrink = self.slide.level_downsamples[level]
        small = round(w / shrink), round(h / shrink)
        return self.slide.read_region((x, y), level, small).convert("RGB")


_slide = functools.lru_cache(maxsize=4)(Slide)


def read_slides(path):
    """A slide, or a folder of slides, class and split folders included, as Images whose `groups`
    are the slides' names. None of them is opened."""
    out = _walk(path, SLIDES, "slides") if os.path.isdir(path) else Images([path])
    names = [pathlib.Path(p).stem for p in out.paths]
    for name in [name for name, n in Counter(names).items() if n > 1][:1]:
        raise InputError(f"two slides are called {name} - rename one, or tile them apart")
    out.about["groups"] = np.array(names)
    return out


def otsu(values):
    """The threshold of uint8 values with the largest variance between classes (Otsu 1979)."""
    count = np.bincount(np.ravel(values), minlength=256).astype(float)
    below, total = np.cumsum(count), np.cumsum(count * np.arange(256))    # at each threshold
    both = below * (below[-1] - below)                       # 0 where a class is empty
    between = (total[-1] * below - total * below[-1]) ** 2 / np.where(both > 0, both, np.inf)
    return int(between.argmax())


def find_tissue(rgb, threshold=8, median=7, close=4, least=16, least_hole=16, max_holes=8):
    """Pieces of tissue in an overview, by CLAM: saturation, median, threshold, closing, size.

    rgb (H, W, 3) uint8. threshold of the saturation (0..255); median, close: sides of the filters;
    least: pixels of a piece without its holes, of which the `max_holes` largest of more than
    `least_hole` pixels stay. Returns (H, W) int: 0, i in piece i, -i in a hole of it."""
    saturation = np.asarray(Image.fromarray(rgb).convert("HSV"))[..., 1]
    saturation = scipy.ndimage.median_filter(saturation, median)    # (H, W)
    mask = scipy.ndimage.grey_closing(saturation > threshold, (close, close))
    label, _ = scipy.ndimage.label(mask, np.ones((3, 3)))    # of eight neighbours
    out, n = np.zeros(mask.shape, np.int32), 0
    for i, where in enumerate(scipy.ndimage.find_objects(label), 1):
        piece = label[where] == i
        if piece.sum() > least:
            n += 1
            holes, _ = scipy.ndimage.label(scipy.ndimage.binary_fill_holes(piece) & ~piece)
            size = np.bincount(holes.ravel())[1:]            # of each hole
            largest = np.argsort(-size, kind="stable")[:max_holes]
            out[where][piece | (holes > 0)] = n
            out[where][np.isin(holes, largest[size[largest] > least_hole] + 1)] = -n
    return out


def tile_boxes(pieces, scale, size, side, step):
    """Tiles as CLAM lays them: (n, 4) int, x, y, width, height in pixels of the slide.

    pieces: from `find_tissue`, one of whose pixels spans `scale` of the slide's, whose size is
    (width, height). Each piece has a grid of its own, from the corner of its bounding box. A tile
    is kept if one of the four points halfway from its centre to its corners is inside the piece's
    outline, and its centre in no hole."""
    def at(x, y):
        i, j = (np.clip((v / scale).astype(int), 0, n - 1) for v, n in zip((y, x), pieces.shape))
        return pieces[i, j]
    found = [np.zeros((0, 4), int)]
    for i, (rows, columns) in enumerate(scipy.ndimage.find_objects(np.abs(pieces)), 1):
        x, y = (np.arange(int(s.start * scale), min(int(s.stop * scale), n - side + 1), step)
                for s, n in ((columns, size[0]), (rows, size[1])))
        x, y = (v.ravel() for v in np.meshgrid(x, y, indexing="ij"))    # column by column
        cx, cy, q = x + side // 2, y + side // 2, side // 4
        corners = [np.abs(at(cx + a, cy + b)) == i for a in (-q, q) for b in (-q, q)]
        kept = np.any(corners, 0) & (at(cx, cy) != -i)
        found.append(np.stack([x, y, np.full_like(x, side), np.full_like(x, side)], 1)[kept])
    return np.concatenate(found)


def tile_slide(path, side=224, step=None, least=0.2, least_hole=0.2, window=None, **how):
    """Tiles of a slide's tissue: `tile_boxes` (n, 4), and an overview with both drawn in.

    side, step: in pixels of the slide. least, least_hole: areas in units of 512 x 512 such pixels;
    CLAM takes 1 and 1 for biopsies, 100 and 16 for resections. window: see `as_rgb`."""
    refuse(side < 1, f"tiles of {side} pixels - give a larger --size")
    slide = _slide(path, window)
    image, scale = slide.overview(2048)
    area = 512 ** 2 / scale ** 2
    pieces = find_tissue(np.asarray(image), least=least * area, least_hole=least_hole * area, **how)
    boxes = tile_boxes(pieces, scale, slide.size, side, step or side)
    refuse(not len(boxes),
           f"{path} has no tissue for {side} px - lower --threshold, --smallest, --size")
    rim = (pieces > 0) & ~scipy.ndimage.binary_erosion(pieces > 0, iterations=2)
    image.paste((0, 160, 0), mask=Image.fromarray(rim))
    draw = ImageDraw.Draw(image)
    for x, y, w, h in boxes / scale:
        draw.rectangle((x, y, x + w, y + h), outline=(30, 60, 200))
    return boxes, image


def slide_tiles(slides, i, boxes, regions=None, share=0.5):
    """The tiles `boxes` of slide i of `read_slides` as Images, with its label and split. With
    regions (`read_polygons`), tiles that lie in them by at least `share` have the label "region"
    instead, others "outside" (thesis 3.2.2: half of the patch)."""
    tiles = slides.take(np.full(len(boxes), i))
    tiles.about["coords"] = boxes
    if regions is not None:
        inside = [region_share(regions, box) >= share for box in boxes]
        tiles.labels, tiles.label_names = np.array(inside).astype(int), ["outside", "region"]
    return tiles


def _read_tiles(files):
    """Tiles as the `tile` command writes them; what not all files say is left out."""
    parts = [_read_listed(file) for file in files]
    for file, part in zip(files, parts):
        refuse("coords" not in part.about, f"{file} lacks 'coords' - name a file that `tile` wrote")
        refuse(part.label_names != parts[0].label_names,
               f"{file} has other 'label_names' than {files[0]} - tile them together")
    for part in parts if any(part.mask is not None for part in parts) else ():
        part.mask = part.labelled
    known = [part.each() for part in parts]
    shared = {key: np.concatenate([one[key] for one in known])
              for key in known[0] if all(key in one for one in known)}
    return Images([path for part in parts for path in part.paths], **_fields(shared),
                  label_names=parts[0].label_names)


def read_polygons(path):
    """The regions of an ASAP annotation file (Camelyon's XML): list of ((n, 2) array of x, y in
    pixels of the slide, inside), outer ones first; not inside: cut out of them (group _2)."""
    found = []
    with reading(path, "ASAP annotation file"):
        for region in ElementTree.parse(path).getroot().iter("Annotation"):
            points = sorted([float(c.get(k)) for k in ("Order", "X", "Y")]
                            for c in region.iter("Coordinate"))
            inside = region.get("PartOfGroup") not in ("_2", "Exclusion")
            if len(points) > 2:
                found.append((np.array(points)[:, 1:], inside))
    return sorted(found, key=lambda region: not region[1])


def region_share(regions, box, grid=64):
    """The share of a box, of grid x grid points, that lies in the regions (`read_polygons`)."""
    x, y, w, h = map(int, box)
    raster = Image.new("1", (grid, grid))
    for polygon, inside in regions:
        points = (polygon - (x, y)) / (w, h) * grid - 0.5    # of pixels' centres
        if (points.max(0) > -1).all() and (points.min(0) < grid).all():
            ImageDraw.Draw(raster).polygon([tuple(p) for p in points], fill=int(inside))
    return float(np.asarray(raster).mean())


def cut_boxes(folder, margin=0.2, window=None):
    """The annotated boxes of a Pascal VOC folder as Images, parts of its pictures, whose `ids` are
    <split>/<name of the object>/<name of the picture>_<i>.

    A part is the square around a box's centre, as long as the box's longer side and `margin` more,
    shifted inwards at the picture's edge. Boxes with a side of 8 pixels or less are left out."""
    found = []
    for split, path, objects, size, stem in _voc(folder, window):
        for i, (name, box) in enumerate(objects):
            sides = box[2:] - box[:2]
            if sides.min() > 8:
                half = min(sides.max() / 2 * (1 + margin), size.min() / 2)
                middle = ((box[:2] + box[2:]) / 2).clip(half, size - half)
                low, high = np.round([middle - half, middle + half]).astype(int)
                found.append((path, [*low, *(high - low)], f"{split}/{name}/{stem}_{i}"))
    refuse(not found, f"{folder} has no box of more than 8 pixels - name another folder")
    paths, squares, ids = map(list, zip(*found))
    return Images(paths, window=window, about={"coords": np.array(squares), "ids": np.array(ids)})


# ---- Bags of instances ---------------------------------------------------------------------------

@dataclass
class Bags:
    """Bags of instances.

    x        list of (N_i, d) float32      y (bags,) int, of label_names     names (bags,)
    folds    (R, F, bags) bool, True = train, or None     split (bags,) or None
    groups   (bags,), patients whose bags stay together, or None
    coords, images  list of (N_i, 4) boxes, of paths, each perhaps None: where instances were cut"""
    x: list
    y: np.ndarray
    label_names: list
    names: list
    folds: np.ndarray = None
    split: np.ndarray = None
    groups: np.ndarray = None
    coords: list = None
    images: list = None

    def __len__(self):
        return len(self.y)

    @property
    def hash(self):
        return _digest(*self.x, np.array([len(x) for x in self.x]), self.y)

    def scale(self, rows):
        """Mean and standard deviation (d,) of the instances of bags `rows`; 1 for a constant."""
        x = np.concatenate([self.x[i] for i in rows])
        std = (x - x[0]).std(0)                              # of a constant exactly 0
        std = np.where(std > 1.2e-7 * np.abs(x[0]), std, 1)
        return torch.from_numpy(x.mean(0)), torch.from_numpy(std)

    def padded(self, rows):
        """x (B, N, d), zeros where a bag is shorter than the longest, mask (B, N), y (B,)."""
        bags = [torch.from_numpy(self.x[i]) for i in rows]
        x = torch.nn.utils.rnn.pad_sequence(bags, batch_first=True)
        mask = torch.arange(x.shape[1]) < torch.tensor([len(bag) for bag in bags])[:, None]
        return x, mask, torch.from_numpy(self.y[np.asarray(rows)]).long()

    def drawn(self, rows, rng, weighted=False):
        """The bags `rows` in random order; weighted: drawn with replacement, as many of a class."""
        y = self.y[rows]
        weight = 1 / np.bincount(y)[y] if weighted else np.ones(len(y))
        return rng.choice(rows, len(rows), replace=weighted, p=weight / weight.sum())

    def rounds(self, folds, seed, source):
        """[(rows to learn from, rows to stop by, perhaps none, rows to report)]: `folds` parts of
        which each is reported in turn; if that is 0, the file's own folds, else its splits, else
        70 / 15 / 15 %. Parts hold every class in proportion and no group twice."""
        everything, none = np.arange(len(self)), np.arange(0)
        if folds:
            parts = stratified_parts(self.y, [1] * folds, seed, self.groups)
            rounds = [(np.delete(everything, part), none, part) for part in parts]
        elif self.folds is not None:
            rounds = [(everything[fold], none, everything[~fold])
                      for fold in self.folds.reshape(-1, len(self))]
        elif self.split is None:
            rounds = [stratified_parts(self.y, (70, 15, 15), seed, self.groups)]
        else:
            rounds = [[np.flatnonzero(self.split == name) for name in SPLITS]]
        for train, _, test in rounds:
            rarest = min((self.y[train] == c).sum() for c in np.unique(self.y))
            refuse(not len(test) or rarest < 2, f"{source}: {len(train)} bags to learn from, "
                   f"{rarest} of a class, and {len(test)} to test on are too few - add bags")
        return rounds


def read_bags(path, stream=None):
    """An .npz with X (n, d), offsets (bags + 1,), y (bags,), where bag i is
    X[offsets[i]:offsets[i + 1]], and perhaps folds (R, F, bags) and groups (bags,); a feature file
    with labels and groups, each of which is a bag; or a folder with a feature file for each bag, as
    `extract` writes them, in class folders, perhaps inside train, val and test folders. stream: of
    feature files that have several."""
    if os.path.isdir(path):
        bags = _bags_of_folder(path, stream)
    else:
        arrays = Source(path)
        grouped = "X" not in arrays and "groups" in arrays and "labels" in arrays
        bags = _bags_of_groups(path, stream) if grouped else _bags_of_file(arrays)
    for name, x in zip(bags.names, bags.x):
        if not len(x) or not np.isfinite(x).all():
            raise InputError(f"bag {name} {'holds NaN or Inf' if len(x) else 'is empty'} - drop it")
    widths = {x.shape[1] for x in bags.x}
    refuse(len(widths) > 1, f"the bags in {path} have widths {sorted(widths)} - take one backbone")
    refuse(len(np.unique(bags.y)) < 2,
           f"all bags have the label {bags.y[0]} - there is nothing to learn")
    return replace(bags, x=[x.astype(np.float32) for x in bags.x], y=bags.y.astype(int))


def _bags_of_folder(path, stream):
    """Each feature file in a folder of class folders as a bag."""
    files = _walk(path, (".npz",), "feature files")
    refuse(files.labels is None, f"{path} has no class folders - name them after the bags' labels")
    x, told, pictures = map(list, zip(*(_instances(file, stream) for file in files.paths)))
    groups = [np.unique(found.about.get("groups", [])) for found in told]
    lone = [file for file, found in zip(files.paths, groups) if len(found) != 1]
    if 0 < len(lone) < len(x):
        raise InputError(f"{lone[0]} has no single group, as other bags have - give one in each")
    return Bags(x, files.labels, files.label_names, [pathlib.Path(p).stem for p in files.paths],
                split=files.split, groups=None if lone else np.concatenate(groups),
                coords=[found.about.get("coords") for found in told],
                images=[found and found[0] for found in pictures])


def _bags_of_groups(path, stream):
    """Each group of a feature file as a bag, with the one label and split of its rows."""
    x, told, pictures = _instances(path, stream)
    labels, split, coords = told.labels, told.split, told.about.get("coords")
    if labels.ndim != 1 or labels.min() < 0:
        raise InputError(f"{path}: 'labels' of shape {labels.shape} leave rows out - give all one")
    names, first, bag, size = np.unique(told.about["groups"], True, True, True)
    for key, a in (("label", labels), ("split", split)):
        for row in [] if a is None else np.flatnonzero(a != a[first][bag])[:1]:
            raise InputError(f"{path}: group {names[bag[row]]} has several {key}s - give it one")

    def cut(a):
        return np.split(a[np.argsort(bag, kind="stable")], np.cumsum(size)[:-1])
    return Bags(cut(x), labels[first], told.label_names, names.astype(str),
                split=None if split is None else split[first],
                coords=None if coords is None else cut(coords),
                images=pictures and [pictures[i] for i in first])


def _instances(path, stream):
    """Of a feature file: the stream (n, d), the Features, and the paths of the pictures that the
    instances were cut from, or None: pixels lie nowhere else."""
    told = read_features(path, stream and [stream], seed=None, most=2)
    refuse(len(told.streams) > 1,
           f"{path} has the streams {', '.join(told.streams)} - pick one with --stream")
    (x,), images = told.streams.values(), told.about.get("images")
    listed = images is not None and images.ndim == 1
    return x, told, [os.path.join(told.folder, p) for p in images] if listed else None


def _bags_of_file(arrays):
    """Bags of an .npz, the shapes and types of its arrays checked against each other."""
    for key in ("X", "offsets", "y"):
        refuse(key not in arrays,
               f"{arrays.path} lacks '{key}' - give X (instances, d), offsets and y (bags,)")
    x, y = _stream(arrays, "X", 2), arrays.checked("y", "(bags,) integers", (np.integer, None))
    n = len(y)
    offsets = arrays.checked("offsets", f"{n} + 1 integers for {n} bags", (np.integer, n + 1))
    groups = arrays.checked("groups", f"one for each of {n} bags", (np.generic, n))
    folds = arrays.checked("folds", f"(repeats, folds, bags) bool for {n} bags, True = train",
                           (np.bool_, None, None, n))
    if folds is not None and not folds.size:
        raise InputError("'folds' has no fold - leave the key out, or give one")
    if offsets[0] != 0 or offsets[-1] != len(x):
        raise InputError(f"'offsets' go from {offsets[0]} to {offsets[-1]} - go from 0 to {len(x)}")
    if not n or not 0 <= y.min() <= y.max() < max(n, 1000):
        raise InputError(f"'y' goes from {min(y, default=0)} to {max(y, default=0)} - count from 0")
    return Bags(np.split(x, offsets[1:-1]), y, [str(c) for c in range(int(y.max()) + 1)],
                [str(i) for i in range(n)], folds, groups=groups)


def stratified_parts(y, shares, seed, groups=None):
    """Cut positions 0..n-1 into parts (ascending) of these shares, every class in proportion.

    No group of groups (n,) lies in two parts, and without them each position is one. It is groups
    that are in proportion, to one, each counted as the rarest class among its samples. Where they
    are few, each part gets one of each class before any gets more than its share."""
    rng, parts = np.random.default_rng([seed, 9]), [[] for _ in shares]
    shares = np.array(shares) / sum(shares)
    member = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1]
    rarity = np.argsort(np.argsort(np.bincount(y), kind="stable"))      # 0: the rarest class
    kind = np.full(member.max() + 1, len(rarity))
    np.minimum.at(kind, member, rarity[y])
    for c in np.unique(kind):
        drawn, got = rng.permutation(np.flatnonzero(kind == c)), np.zeros(len(shares))
        for g in drawn:                                      # to what lacks most, else the smallest
            lack = shares * len(drawn) - got + (got == 0)
            i = np.lexsort(([len(part) for part in parts], -lack.round(9)))[0]
            got[i] += 1
            parts[i].append(g)
    return [np.flatnonzero(np.isin(member, part)) for part in parts]


