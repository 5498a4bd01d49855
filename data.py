"""Everything that enters: feature files, splits, batches, taxonomies, and a made-up world whose truth is known.

Read first   thesis A.1.1-A.1.2 (datasets, split, contiguous batches); for pictures, slides and bags 3.2.1-3.2.2 and 3.3.2.
Glossary     N samples . T tokens of a sample . d_s width of stream s . C labels . a stream is one model's features of the
             same N samples

A feature file is an .npz, or a folder of .npy files, with one floating array (N, d_s), or (N, T, d_s) for tokens, per
stream, its key (or file name) the stream's name; row i is the same sample everywhere. Reserved keys, all optional:
    labels (N,) or (N, 1) of any integer type, or (N,) text, whose sorted values are then the names
           of the labels; or (N, C) bool, where a row of False means "none of these"
    mask   (N,) bool, False = the labels of this row are not known
    label_names (C,)     split (N,) of train / val / test     groups (N,) e.g. patients
    ids, captions (N,)   images (N,) paths relative to the file, or pixels (N, H, W[, 3]) uint8
    coords
    grid (2,) int: rows and columns of the T tokens     boxes (n, 6): sample, label, x0, y0, x1, y1 in shares of the picture
A row is unlabelled where its label is negative or "" or `mask` is False: it then counts neither for
nor against any label.
Nothing is ever unpickled. A folder is memory-mapped: a batch reads its own rows and no others.

Deviations   from the authors' code: rows are never joined by position alone, without a check that
             the counts agree; the short last block is shuffled among the others, not put last;
             a tile counts as tumour when half of it lies in a region (Vim4Path's notebook compares
             a sixteenth), and no tiles reach over a slide's edge (CLAM's do).
Ours         the made-up streams and tissue; weaker colour changes and pathology's turns in `Crops`.
"""
import functools
import gzip
import hashlib
import json
import math
import os
import re
import sys
import zlib
from dataclasses import dataclass, field, replace
from xml.etree import ElementTree

import numpy as np
import scipy.ndimage
import scipy.sparse
import scipy.sparse.linalg
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

RESERVED = ("labels", "label_names", "ids", "groups", "split", "captions", "images", "coords", "grid", "mask", "boxes")
SPLITS = ("train", "val", "test")
LARGEST = np.float32(1e15)  # of a feature: sums of squares must stay below 3e38, the end of float32


class InputError(ValueError):
    """What the caller can mend: the message says what was wrong and, after a dash, what to do."""


@dataclass
class Features:
    """Streams of the same N samples and what is known about them.

    streams      dict stream -> (N, d_s) or (N, T, d_s) float array, in memory or memory-mapped, any float dtype
    split        (N,) of "train", "val", "test"
    labels       (N,) int, negative where unlabelled, or (N, C) bool, or None
    mask         (N,) bool, False where (N, C) labels are not known, or None
    label_names  list of C names
    parents      taxonomy: dict name -> name of its parent, None for the root; empty when there is none
    about        dict of the other per-sample arrays that the file gave: ids, groups, captions, images
    grid         (rows, columns) of the tokens, or None       boxes  (n, 6) as in the file, or None
    truth        made-up data only: dict stream -> (C, d_s), the direction of each concept, zeros where it is unseen
    order        dict stream -> (N,) rows: sample i of the stream is its row order[i]; how the null breaks the pairing
    notes        list of lines the user should see
    folder       the file's own, which `images` are relative to
    """
    streams: dict
    split: np.ndarray
    labels: np.ndarray = None
    label_names: list = field(default_factory=list)
    parents: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)
    grid: tuple = None
    boxes: np.ndarray = None
    truth: dict = None
    order: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    hash: str = ""
    mask: np.ndarray = None
    folder: str = "."

    def __len__(self):
        return len(self.split)

    @property
    def labelled(self):
        """(N,) bool: the rows whose labels are known; none without labels."""
        return _labelled(self.labels, self.mask, len(self))

    def picture(self, row):
        """A sample's picture in RGB, or None when the file gives none or it cannot be read."""
        images = self.about.get("images")
        if images is None:
            return None
        if images.ndim > 1:
            return Image.fromarray(np.asarray(images[row])).convert("RGB")
        try:
            return open_image(os.path.join(self.folder, images[row]))
        except InputError:
            return None

    @property
    def dims(self):
        return {s: x.shape[-1] for s, x in self.streams.items()}

    @property
    def tokens(self):
        """T, or None where a sample is a single vector."""
        x = next(iter(self.streams.values()))
        return x.shape[1] if x.ndim == 3 else None

    @property
    def mapped(self):
        """Whether a batch is read from disk, where neighbouring rows are cheap."""
        return any(isinstance(x, np.memmap) for x in self.streams.values())

    def sorted_rows(self):
        """Whether the training rows come sorted by their label, so that neighbours are alike."""
        if self.labels is None or self.labels.ndim != 1:
            return False
        y = self.labels[self.rows("train")]
        chance = (np.unique(y, return_counts=True)[1] / len(y)) ** 2
        return bool((y[1:] == y[:-1]).mean() > (1 + chance.sum()) / 2) if len(y) > 1 else False

    def per_token(self):
        """The same with every token a sample: streams (N * T, d_s), still memory-mapped if they were; no labels."""
        if not self.tokens:
            return self
        flat = {s: x.reshape(-1, x.shape[-1]) for s, x in self.streams.items()}
        return replace(self, streams=flat, split=np.repeat(self.split, self.tokens), labels=None, label_names=[], parents={},
                       about={}, grid=None, boxes=None, mask=None)

    def rows(self, *splits):
        """Row numbers, ascending, of the first of `splits` that has any: rows("test", "val")."""
        for name in splits:
            rows = np.flatnonzero(self.split == name)
            if len(rows):
                return rows
        raise InputError(f"the {' and '.join(splits)} split is empty - give 'split' values or more samples")

    def batch(self, rows):
        """Raw features of `rows` (B,): dict stream -> (B, d_s) or (B, T, d_s) float32 tensor."""
        return {s: torch.from_numpy(np.asarray(x[self.order[s][rows] if s in self.order else rows], dtype=np.float32))
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
        """Per-dimension mean and standard deviation over `rows`, read block by block: dict stream -> (mean, std)."""
        total, square = ({s: np.zeros(d) for s, d in self.dims.items()} for _ in range(2))
        # against cancellation
        shift = {s: x[:1].mean(0).double().numpy() for s, x in self.batch(rows[:block]).items()}
        for start in range(0, len(rows), block):
            for s, x in self.batch(rows[start:start + block]).items():
                x = x.double().numpy() - shift[s]
                total[s] += x.sum(0)
                square[s] += (x * x).sum(0)
        n = len(rows)
        variance = {s: np.maximum(square[s] / n - (total[s] / n) ** 2, 0) for s in self.streams}
        return {s: (torch.from_numpy(total[s] / n + shift[s]).float(), torch.from_numpy(np.sqrt(variance[s])).float())
                for s in self.streams}

    def shuffled(self, seed):
        """The null: the same samples, every stream but the first permuted inside each split, so nothing is shared."""
        rng, order = np.random.default_rng([seed, 1]), {}
        for s in list(self.streams)[1:]:
            order[s] = np.arange(len(self))
            for name in SPLITS:
                rows = np.flatnonzero(self.split == name)
                order[s][rows] = rng.permutation(rows)
        return replace(self, order=order, truth=None)


class Batches:
    """Which rows form training batch number `step`: a pure function of the step, so that a resumed run sees the same.

    shuffle="blocks": contiguous blocks of `rows` in random order (thesis A.1.2, "Data Loading Optimization"): what
    makes memory-mapped folders fast. "samples": every epoch a new permutation. `epoch` is the number of steps in an
    epoch. drop_last: without what does not fill a batch.
    """

    def __init__(self, rows, batch, seed, shuffle="blocks", drop_last=False):
        self.all, self.batch, self.seed, self.shuffle = rows, batch, seed, shuffle
        self.epoch = max(len(rows) // batch, 1) if drop_last else -(-len(rows) // batch)
        self._epoch, self._order = None, None

    def rows(self, step):
        epoch, i = divmod(step, self.epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, 0, epoch])
            self._epoch, self._order = epoch, rng.permutation(self.epoch if self.shuffle == "blocks" else len(self.all))
        if self.shuffle == "blocks":
            i = self._order[i]
            return self.all[i * self.batch:(i + 1) * self.batch]
        return self.all[np.sort(self._order[i * self.batch:(i + 1) * self.batch])]


# ---------------------------------------------------------------------------------------------------------------------
# Feature files
# ---------------------------------------------------------------------------------------------------------------------

def read_features(path, streams=None, taxonomy=None, seed=42):
    """Read and check a feature file (see the top of this module).

    streams: names to use, in this order; all by default. taxonomy: a JSON file, see `read_taxonomy`. seed: of the
    split, when the file has none. Raises InputError naming the stream, key or row at fault.
    """
    arrays = _Source(path)
    names = stream_names(path)
    if streams:
        unknown = [s for s in streams if s not in names]
        if unknown:
            raise InputError(f"{path} has no stream '{unknown[0]}' - it has {', '.join(names) or 'none'}")
        names = list(dict.fromkeys(streams))
    if not names:
        raise InputError(f"{path} holds no stream - give at least one floating array (N, d) under a name of your own")
    x = {s: _check_stream(path, s, arrays[s]) for s in names}
    sizes = {s: len(a) for s, a in x.items()}
    n = sizes[names[0]]
    for s in names:
        if sizes[s] != n:
            raise InputError(f"stream '{s}' has {sizes[s]} rows but '{names[0]}' has {n} - "
                             "rows must be the same samples")
    tokens = {s: a.shape[1] if a.ndim == 3 else None for s, a in x.items()}
    if len(set(tokens.values())) > 1:
        raise InputError(f"{path}: tokens per sample differ between streams, {tokens} - pick streams alike with --streams")
    about = _about(arrays, n)
    labels, label_names, mask = _read_labels(arrays, n)
    parents = read_taxonomy(taxonomy, label_names) if taxonomy else {}
    split = _split(about.pop("split", None), about.get("groups"), n, seed)
    out = Features(x, split, labels, label_names, parents, about,
                   _check_grid(arrays.get("grid"), tokens[names[0]]),
                   _check_boxes(arrays.get("boxes"), n, label_names), mask=mask,
                   folder=os.path.dirname(os.path.abspath(path)))
    _scan(out)
    out.notes += _torn_groups(out.split, about.get("groups"))
    return out


def _torn_groups(split, groups):
    """A note, as a list, where a split (N,) tears groups (N,); none where either is None."""
    if split is None or groups is None:
        return []
    names, group = np.unique(groups, return_inverse=True)
    parts = np.unique(np.stack([group, np.unique(split, return_inverse=True)[1]]), axis=1)[0]           # a column a group and part
    torn = names[np.bincount(parts) > 1]
    return [f"{len(torn)} of {len(names)} groups (first: {g}) lie in several splits" for g in torn[:1]]


def stream_names(path):
    """The names of the streams in a feature file."""
    return [k for k in _Source(path).where if k not in RESERVED]


class _Source:
    """The arrays of an .npz or of a folder of .npy, by key, read when asked for; a folder's are memory-mapped. What else lies
    in the folder or is packed into the .npz is passed over."""

    def __init__(self, path):
        self.path, self.npz = path, None
        if os.path.isdir(path):
            self.where = {f[:-4]: os.path.join(path, f) for f in sorted(os.listdir(path)) if f.endswith(".npy")}
        else:
            self.npz = _load(path, lambda: np.load(plain_file(path), allow_pickle=False))
            if not isinstance(self.npz, np.lib.npyio.NpzFile):
                raise InputError(f"{path} holds one array without a name - save an .npz with one key per stream")
            self.where = {f[:-4]: f for f in self.npz.zip.namelist() if f.endswith(".npy")}
        for key in self.where:
            if not key.isprintable():
                raise InputError(f"{path} has the key {key!r} - name it in printable letters")

    def __contains__(self, key):
        return key in self.where

    def __getitem__(self, key):
        if self.npz is None:
            return _load(self.where[key], lambda: _array(np.load(plain_file(self.where[key]), "r", allow_pickle=False)))
        return _load(f"{self.path}, key '{key}'", lambda: _array(self._member(self.where[key])))

    def _member(self, name):
        """An array of the .npz, if it declares the size that it has: numpy makes room for what is declared, then reads."""
        info = self.npz.zip.getinfo(name)
        with self.npz.zip.open(info) as f:
            header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, _, dtype = header[np.lib.format.read_magic(f)[0]](f)
            size = math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and size != info.file_size - f.tell():
                raise ValueError(f"declares {size} bytes")
        return self.npz[name]

    def get(self, key):
        return self[key] if key in self else None


def read_arrays(path):
    """All arrays of an .npz, or of a folder of .npy, by key; nothing is unpickled."""
    source = _Source(path)
    return {key: source[key] for key in source.where}


def read_vector(path):
    """One vector (d,) from a .npy, as a float32 tensor; raises InputError for anything else."""
    x = _load(path, lambda: np.load(plain_file(path), "r", allow_pickle=False))             # mapped: its size is checked
    if not isinstance(x, np.ndarray) or x.ndim != 1 or not np.issubdtype(x.dtype, np.floating) or not np.isfinite(x).all():
        raise InputError(f"{path} does not hold one vector of finite floating numbers - save it with numpy.save")
    return torch.from_numpy(x.astype(np.float32))


def plain_file(path):
    """The path, unless a pipe, a device or a folder is there, or it is no path at all: raises InputError. A file that is
    missing is left to who opens it."""
    if "\0" in os.fspath(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise InputError(f"{path} is no plain file - name one")
    return path


def read_json(path):
    """What a JSON file holds. Raises InputError when it cannot be read."""
    with open(plain_file(path), "rb") as f:
        text = f.read()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not readable JSON ({e}) - write or restore it")


def _load(what, read):
    """What read() returns, an array or an .npz; raises InputError saying what is wrong with `what`."""
    try:
        return read()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no file or folder {what} - check the path")
    except PermissionError:
        raise InputError(f"{what} may not be read - check its permissions")
    except MemoryError:
        raise InputError(f"{what} does not fit into memory - save it as a folder of .npy files")
    except ValueError as e:
        if "Object array" in str(e):
            raise InputError(f"{what} is an array of Python objects - save plain numbers or strings, "
                             "nothing is unpickled")
        raise InputError(f"{what} is not a readable .npz or .npy file - save features with numpy.savez")
    except Exception:                                        # numpy and zipfile raise many kinds for broken files
        raise InputError(f"{what} is cut off or damaged - write it again")


def _array(x):
    """The array x, in this machine's order of bytes, if it holds numbers, truth values or text; else raises InputError."""
    if x.dtype.kind not in "biufUS":
        raise InputError(f"an array holds {x.dtype} - save plain numbers or strings")
    if x.dtype.kind == "U":
        "".join(x.ravel().tolist()).encode()                 # a ValueError for what is no text
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def _check_stream(path, name, x):
    if not np.issubdtype(x.dtype, np.floating):
        raise InputError(f"stream '{name}' holds {x.dtype} - convert it to a float type "
                         f"(reserved keys: {', '.join(RESERVED)})")
    if x.ndim not in (2, 3):
        raise InputError(f"stream '{name}' has shape {x.shape} - a stream is (samples, width)"
                         " or (samples, tokens, width)")
    if 0 in x.shape:
        raise InputError(f"stream '{name}' has shape {x.shape} - it needs at least one row and one column")
    return x


def _texts(a):
    """An array of str, or of UTF-8 bytes, as one of str."""
    return np.char.decode(a, "utf-8", "replace") if a.dtype.kind == "S" else a.astype(str)


def _about(arrays, n):
    """What a file says of each of its n samples: dict of `ids`, `groups`, `captions`, `images` and
    `split`, where it has them, bytes as str. Raises InputError for shapes unlike the header's."""
    keys = ("ids", "groups", "captions", "images", "split")
    found = {k: arrays[k] for k in keys if k in arrays}
    for k, a in found.items():
        fits, wanted = a.ndim == 1, "one entry for each row"
        if k == "images":
            pixels = a.dtype == np.uint8 and (a.ndim == 3 or a.shape[3:] == (3,))
            fits = pixels or fits and a.dtype.kind in "US"
            wanted = "(N,) paths or (N, H, W[, 3]) uint8"
        if not fits:
            raise InputError(f"'{k}' has shape {a.shape} and type {a.dtype} - give {wanted}")
        if len(a) != n:
            raise InputError(f"'{k}' has {len(a)} entries for {n} samples - give one for each row")
    return {k: _texts(a) if a.dtype.kind == "S" else a for k, a in found.items()}


def _read_labels(arrays, n):
    """(labels, names, mask) of a file of n samples: labels (N,) int, negative where unlabelled, and
    no mask; or (N, C) bool with `mask` as the file has it; or None without labels."""
    labels, mask = arrays.get("labels"), arrays.get("mask")
    if mask is not None and (mask.shape != (n,) or mask.dtype != bool):
        raise InputError(f"'mask' has shape {mask.shape} and type {mask.dtype} for {n} samples - "
                         "give (N,) booleans, False where the labels are not known")
    if labels is None:
        return None, [], None
    if labels.ndim and len(labels) != n:
        raise InputError(f"'labels' has {len(labels)} entries for {n} samples - give one each")
    labels, names = _check_labels(labels, arrays.get("label_names"))
    if labels.ndim == 1:
        return labels if mask is None else np.where(mask, labels, -1), names, None
    return labels, names, mask


def _labelled(labels, mask, n):
    """(N,) bool: the rows whose labels, as `_read_labels` gives them, are known."""
    if labels is None:
        return np.zeros(n, bool)
    known = labels >= 0 if labels.ndim == 1 else np.ones(n, bool)
    return known if mask is None else known & mask


MOST_LABELS = 10 ** 6    # greater numbers are no classes, and would each take a column


def _check_labels(labels, names):
    """Labels, (N,) int64, negative where unlabelled, or (N, C) bool, and their C names."""
    names = None if names is None else _texts(np.atleast_1d(names)).ravel().tolist()
    if labels.ndim == 1 and labels.dtype.kind in "US":
        labels, names = _named_labels(_texts(labels), names)
    whole = np.issubdtype(labels.dtype, np.integer)
    if whole and labels.ndim == 2 and labels.shape[1] == 1 and len(names or ()) != 1:
        labels = labels[:, 0]                                # as MedMNIST has it
    if labels.ndim == 1 and whole:
        count = int(labels.max()) + 1 if labels.size else 0
        if count > MOST_LABELS:
            row = int(labels.argmax())
            raise InputError(f"'labels' row {row} is {count - 1} - number the classes from 0, a "
                             f"million at most")
        count, labels = max(count, 0), labels.astype(np.int64)
    elif labels.ndim == 2 and labels.size and (labels.dtype == bool or whole and 0 <= labels.min()
                                               and labels.max() <= 1):
        count, labels = labels.shape[1], labels.astype(bool, copy=False)
    else:
        raise InputError(f"'labels' has shape {labels.shape} and type {labels.dtype} - "
                         "give (N,) integers or text, or (N, C) booleans")
    if names is None:
        if count > max(len(labels), 1000):                   # each takes memory
            raise InputError(f"'labels' go up to {count - 1} for {len(labels)} samples - number the classes from 0")
        names = [f"label {i}" for i in range(count)]
    if len(names) < count or (labels.ndim == 2 and len(names) != count):
        raise InputError(f"'label_names' has {len(names)} names for {count} labels - give one each")
    return labels, names


def _named_labels(labels, names):
    """Labels as text (N,) -> (N,) numbers of `names`, or of their own sorted values; "" is -1."""
    names = sorted({*labels.tolist()} - {""}) if names is None else names
    number = {"": -1, **{name: i for i, name in enumerate(names)}}
    strange = [(i, v) for i, v in enumerate(labels.tolist()) if v not in number][:1]
    for row, label in strange:
        raise InputError(f"'labels' row {row} is {label[:40]!r}, none of 'label_names' - add it")
    return np.array([number[v] for v in labels.tolist()], np.int64), names


def _check_grid(grid, tokens):
    """(rows, columns) of the tokens, or None."""
    if grid is None or not tokens:
        return None
    if grid.shape != (2,) or grid.dtype.kind not in "iuf" or not (grid > 0).all() or grid.prod() != tokens:
        raise InputError(f"'grid' is {grid.tolist()} for {tokens} tokens - give rows and columns whose product they are")
    return int(grid[0]), int(grid[1])


def _check_boxes(boxes, n, label_names):
    """(n, 6) boxes whose samples and labels exist, or None."""
    if boxes is None:
        return None
    if boxes.ndim != 2 or boxes.shape[1] != 6 or boxes.dtype.kind not in "biuf" or not np.isfinite(boxes).all():
        raise InputError(f"'boxes' has shape {boxes.shape} and type {boxes.dtype} - give rows of sample, label, x0, y0, x1, y1")
    most = max(len(label_names), 1)
    bad = np.flatnonzero((boxes[:, 0] < 0) | (boxes[:, 0] >= n) | (boxes[:, 1] < 0) | (boxes[:, 1] >= most)
                         | (boxes[:, 2:] < 0).any(1) | (boxes[:, 2:] > 1).any(1) | (boxes[:, 2:4] >= boxes[:, 4:]).any(1))
    if len(bad):
        raise InputError(f"'boxes' row {bad[0]} is {boxes[bad[0]].tolist()} - give a sample of {n}, a label of {most}, and "
                         "x0 < x1, y0 < y1 in shares of the picture, 0 to 1")
    return boxes


def _split(given, groups, n, seed):
    """(N,) of train / val / test: as given; else 80 % of the groups, or of the samples, train, the rest val (A.1.2)."""
    if given is not None:
        split = np.array([v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in given.tolist()])
        bad = np.flatnonzero(~np.isin(split, SPLITS))
        if len(bad):
            raise InputError(f"'split' row {bad[0]} is '{split[bad[0]]}' - use train, val or test")
        return split
    unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    order = np.random.default_rng([seed, 2]).permutation(unit.max() + 1)
    held_out = order[round(0.8 * len(order)):]
    return np.where(np.isin(unit, held_out), "val", "train")


def _scan(features, block_bytes=1 << 24):
    """One pass over all streams: refuse NaN and Inf, count zero rows, and hash what the run depends on."""
    digest = hashlib.sha256()
    for s, x in features.streams.items():
        digest.update(f"{s} {x.dtype} {x.shape}".encode())
        step, zeros = max(1, block_bytes // (x[0].size * x.itemsize)), 0
        for start in range(0, len(x), step):
            block = np.ascontiguousarray(x[start:start + step]).reshape(len(x[start:start + step]), -1)
            bad = ~(np.abs(block) <= LARGEST).all(1)         # so compared, NaN is bad too
            if bad.any():
                row = start + int(bad.argmax())
                finite = np.isfinite(block[bad.argmax()]).all()
                what, do = (("numbers beyond 1e15", "scale") if finite
                            else ("NaN or Inf", "drop or mend"))
                raise InputError(f"stream '{s}' has {what} in {bad.sum()} or more rows, "
                                 f"first row {row} - {do} them")
            zeros += int((~block.any(1)).sum())
            digest.update(block)
        if zeros:
            features.notes.append(f"stream '{s}' has {zeros} all-zero rows: the loss skips them, "
                                  "retrieval counts them as missed")
    for a in (features.labels, features.mask, features.split, features.label_names,
              sorted(features.parents.items(), key=str)):
        digest.update(repr(a).encode() if isinstance(a, list) else b"" if a is None
                      else np.ascontiguousarray(a).tobytes())
    features.hash = digest.hexdigest()[:16]


def read_taxonomy(path, label_names):
    """Read a taxonomy from JSON: {"child": "parent", ..., "root": null}, or nested {"LabelName", "Subcategory": [...]}
    as Open Images has it (a name that stands twice counts where it is deepest). Returns dict name -> parent or None.

    Raises InputError for a cycle, a parent that is no entry, several roots, or a label that is missing.
    """
    if not os.path.exists(path):
        raise InputError(f"no taxonomy at {path} - check the path")
    tree, parents, sound = read_json(path), {}, set()        # sound: what leads to the root
    nested = isinstance(tree, dict) and "LabelName" in tree
    if not isinstance(tree, dict) or not nested and not all(v is None or isinstance(v, str) for v in tree.values()):
        raise InputError(f"{path} holds a {type(tree).__name__} - "
                         "give {\"child\": \"parent\"} or nested LabelName/Subcategory")
    if nested:
        queue = [(tree, None)]                               # breadth first: what is seen last is deepest
        for node, parent in queue:
            if not isinstance(node, dict) or not isinstance(node.get("LabelName"), str) \
                    or not isinstance(node.get("Subcategory", []), list):
                raise InputError(f"{path}: a node below {parent} has no LabelName of text, or no list as its Subcategory - "
                                 "mend it")
            parents[node["LabelName"]] = parent
            queue += [(child, node["LabelName"]) for child in node.get("Subcategory", [])]
    else:
        parents = tree
    roots = [k for k, v in parents.items() if v is None]
    for child, parent in parents.items():
        if parent is not None and parent not in parents:
            raise InputError(f"taxonomy: '{child}' has the unknown parent '{parent}' - "
                             "add it, with null as the root's parent")
        seen = {child}
        while parent is not None and parent not in sound:
            if parent in seen:
                raise InputError(f"taxonomy: '{child}' is its own ancestor - break the cycle at '{parent}'")
            seen.add(parent)
            parent = parents.get(parent)                     # one that is unknown is named in its turn
        sound |= seen
    if len(roots) != 1:
        raise InputError(f"taxonomy has {len(roots)} roots - give exactly one entry the parent null")
    missing = [v for v in label_names if v not in parents]
    if missing:
        raise InputError(f"taxonomy lacks the label '{missing[0]}' - add it, or take other label_names")
    return parents


# ---------------------------------------------------------------------------------------------------------------------
# A made-up world
# ---------------------------------------------------------------------------------------------------------------------

def planted_streams(n=6000, dims=None, families=(4, 3, 4), seed=42):
    """Streams whose concepts are known: the embedded default, and the truth that the tests hold a model to.

    A sample is a sparse non-negative mixture of concepts: one family is the theme, some concepts come from it, some
    from anywhere, frequent ones more often. Every stream shows the concepts it sees through its own random unit
    vectors, bends the result slightly (tanh) and adds its own level of noise. Of the leaves, each stream alone sees
    two, and each is blind to two others.

    dims      dict stream -> width           families  kingdoms, families in each, concepts in each
    Returns Features: labels (n, C) bool are the active concepts, `parents` the taxonomy (world > kingdom > family >
    concept), `truth` the concepts' directions per stream; 80 % train, 20 % val.
    """
    dims = dims or {"vision": 64, "text": 48, "sound": 40}
    rng = np.random.default_rng([seed, 3])
    parents, leaves = {"world": None}, []
    for i in range(families[0]):
        parents[(kingdom := "ABCDEFGH"[i])] = "world"
        for j in range(families[1]):
            parents[(family := f"{kingdom}{j + 1}")] = kingdom
            for m in range(families[2]):
                parents[f"{family}{'abcdefgh'[m]}"] = family
                leaves.append(f"{family}{'abcdefgh'[m]}")
    C, M = len(leaves), len(dims)
    family_of = np.arange(C) // families[2]
    # the rarest is 1/7 as frequent as the first
    frequency = rng.permutation(1 / (1 + np.arange(C) / 8))
    seen = np.ones((C, M), bool)
    special = rng.permutation(C)[:4 * M].reshape(M, 2, 2)
    for m in range(M):
        seen[special[m, 0]] = np.arange(M) == m                                  # private to stream m
        if M > 1:
            seen[special[m, 1], m] = False                                       # stream m is blind to these

    labels = np.zeros((n, C), bool)
    theme = rng.integers(C // families[2], size=n)
    for i in range(n):
        p = frequency * np.where(family_of == theme[i], 8., 1.)
        labels[i, rng.choice(C, size=rng.integers(2, 6), replace=False, p=p / p.sum())] = True
    amount = labels * rng.uniform(0.5, 1.5, size=(n, C))

    streams, truth = {}, {}
    for m, (s, d) in enumerate(dims.items()):
        D = rng.standard_normal((C, d))
        D *= seen[:, m:m + 1] / np.linalg.norm(D, axis=1, keepdims=True)
        noise = (0.05, 0.1, 0.15)[m % 3] / d ** 0.5 * rng.standard_normal((n, d))
        streams[s], truth[s] = (np.tanh(amount @ D) + noise).astype(np.float32), D
    out = Features(streams, _split(None, None, n, seed), labels, leaves, parents, truth=truth)
    _scan(out)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# A made-up tissue: images whose truth is known
# ---------------------------------------------------------------------------------------------------------------------

# name, lineage, cell radius (of a 64-pixel image), nucleus (kind, radius / cell radius), cytoplasm or None, granules or None
CELLS = (("lymphocyte", "lymphoid", (5.5, 7.), ("round", .82), (178, 190, 230), None),
         ("plasma cell", "lymphoid", (7.5, 9.), ("aside", .5), (168, 132, 200), None),
         ("neutrophil", "myeloid", (7.5, 9.), ("lobes 3", .42), (244, 218, 228), None),
         ("eosinophil", "myeloid", (7.5, 9.), ("lobes 2", .42), (250, 200, 190), (214, 62, 40)),
         ("monocyte", "myeloid", (8.5, 10.5), ("crescent", .75), (176, 186, 212), None),
         ("fibroblast", "stromal", (9., 12.), ("long", 1.), None, None),
         ("tumour cell", "epithelial", (9.5, 12.), ("nucleolus", .66), (222, 160, 205), None),
         ("goblet cell", "epithelial", (9., 11.), ("cap", .95), (246, 248, 252), None),
         ("mitosis", "epithelial", (9., 11.), ("plate", .7), (226, 180, 214), None))
GROUNDS = ("pale stroma", "fibres", "vacuoles")
DISEASES = {"healthy": (4, 1, 2, 1, 2, 5, 0, 3, .1), "infection": (2, 3, 8, 1, 3, 3, 0, 2, .2),
            "allergy": (2, 2, 1, 8, 2, 3, 0, 3, .1), "carcinoma": (2, 1, 1, 1, 1, 3, 8, 2, 1.5)}   # weights of the CELLS
NUCLEUS = np.array((92, 48, 140), np.float32)


def tissue(n, size=64, seed=0):
    """Microscope-like fields with known truth: `n` uint8 images of `size` pixels, one to four cells of nine kinds each.

    Every patient's images come from two slides, which differ in stain and focus; a patient's disease shifts the mix of
    cells. The same seed gives the same bytes. Returns a dict:
        pixels (n, size, size, 3), captions (n,), labels (n, C) bool with label_names: the kinds, mucin and the three grounds;
        parents: taxonomy name -> parent (specimen > cell > lineage > kind, specimen > tissue > ground or mucin)
        instances (n, size, size): 0, or 1 + the number of the object on top; boxes (m, 6): image, label, x0, y0, x1, y1 in
        shares of the image, objects of an image in the order of their numbers
        groups, slides (n,), disease (n,) with disease_names; split (n,): of each disease 30 % of the patients, at least one,
        are `test`
    """
    rng = np.random.default_rng([seed, 20])
    names, f = [c[0] for c in CELLS] + ["mucin", *GROUNDS], size / 64
    patients = max(8, n // 20)
    of = np.sort(np.arange(n) % patients)
    illness = np.arange(patients) % len(DISEASES)
    slides = 2 * of + rng.integers(2, size=n)
    weights = np.array(list(DISEASES.values()), float)
    share = weights / weights.sum(1, keepdims=True)
    count = rng.integers(1, 5, n)
    kind = (rng.random((n, 4, 1)) > share.cumsum(1)[illness[of]][:, None]).sum(2).clip(max=len(CELLS) - 1)
    ground = rng.integers(len(GROUNDS), size=n)
    mucin = rng.random(n) < np.where(illness[of] == 3, .2, .04)
    image, instances = _draw_grounds(n, size, ground, mucin, rng), np.zeros((n, size, size), np.uint8)
    if mucin.any():
        instances[mucin] = _mucin(image, mucin, size, rng)
    quarter = rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1)
    middle = (np.stack([quarter % 2, quarter // 2], -1) * 32 + 16 + rng.uniform(-4, 4, (n, 4, 2))) * f
    for slot in range(4):
        for k in range(len(CELLS)):
            rows = np.flatnonzero((kind[:, slot] == k) & (slot < count))
            if len(rows):
                _draw_cells(image, instances, rows, CELLS[k], middle[rows, slot], 1 + mucin[rows] + slot, f, rng)
    labels = np.zeros((n, len(names)), bool)
    for slot in range(4):
        labels[np.flatnonzero(slot < count), kind[slot < count, slot]] = True
    labels[np.arange(n), len(CELLS) + 1 + ground] = True
    labels[:, len(CELLS)] = mucin
    boxes = []
    for i in range(n):
        objects = [len(CELLS)] * int(mucin[i]) + kind[i, :count[i]].tolist()
        for number, place in enumerate(scipy.ndimage.find_objects(instances[i], len(objects))):
            if place:                                        # None where others hide it
                boxes.append((i, objects[number], place[1].start, place[0].start, place[1].stop, place[0].stop))
    boxes = np.array(boxes, float)
    boxes[:, 2:] /= size
    test = np.zeros(patients, bool)
    for d in range(len(DISEASES)):
        mine = rng.permutation(np.flatnonzero(illness == d))
        test[mine[:max(1, round(.3 * len(mine)))]] = True
    lineages = {c[1] for c in CELLS}
    parents = {"specimen": None, "cell": "specimen", "tissue": "specimen", **dict.fromkeys(sorted(lineages), "cell"),
               **{c[0]: c[1] for c in CELLS}, **dict.fromkeys(("mucin", *GROUNDS), "tissue")}
    return {"pixels": _stain(image, slides, rng), "labels": labels, "label_names": np.array(names), "parents": parents,
            "captions": np.array([_caption(kind[i, :count[i]], ground[i], mucin[i], rng) for i in range(n)]),
            "instances": instances, "boxes": boxes, "groups": of, "slides": slides,
            "disease": illness[of], "disease_names": np.array(list(DISEASES)), "split": np.where(test[of], "test", "train")}


def patient_slides(pixels, groups, across=4):
    """Yield (group, (H, W, 3) uint8): a patient's pictures (n, h, w, 3) in rows, as if one slide."""
    for group in np.unique(groups):
        mine = pixels[groups == group]
        n, h, w, _ = mine.shape
        rows = -(-n // across)
        sheet = np.full((rows * across, h, w, 3), 255, np.uint8)
        sheet[:n] = mine
        sheet = sheet.reshape(rows, across, h, w, 3).swapaxes(1, 2)
        yield group, sheet.reshape(rows * h, across * w, 3)


def _cloud(n, size, cells, rng):
    """Smooth noise (n, size, size), about N(0, 1) at each of cells x cells points and in between interpolated."""
    coarse = torch.from_numpy(rng.standard_normal((n, 1, cells, cells), dtype=np.float32))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[:, 0].numpy()


def _draw_grounds(n, size, ground, mucin, rng):
    """Empty tissue, float32 (n, size, size, 3): pale stroma, fibres in one direction, or fat vacuoles."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    base = np.array([(240, 222, 232), (236, 196, 214), (238, 212, 224)], np.float32)[ground]
    image = base[:, None, None] + (4 * _cloud(n, size, 9, rng) + 2 * rng.standard_normal((n, size, size),
                                                                                         dtype=np.float32))[..., None]
    rows = np.flatnonzero(ground == 1)
    angle, phase = rng.uniform(0, 3, (2, len(rows), 1, 1)).astype(np.float32)
    wave = np.cos(angle) * x + np.sin(angle) * y + np.float32(.02) * _cloud(len(rows), size, 5, rng)
    image[rows] -= (9 + 9 * np.sin(np.float32(50) * wave + 2 * phase))[..., None] * np.array((.3, 1, .7), np.float32)
    rows = np.flatnonzero(ground == 2)
    fat = image[rows]
    for _ in range(4):
        cx, cy, r = (rng.uniform(a, b, len(rows)).astype(np.float32)[:, None, None] for a, b in ((0, 1), (0, 1), (.07, .15)))
        d = (r - np.sqrt((x - cx) ** 2 + (y - cy) ** 2)) * size                             # pixels inside the rim
        i, py, px = np.nonzero(d > -2)
        inside, rim = np.clip(d[i, py, px], 0, 1)[:, None], np.clip(1 - abs(d[i, py, px]) / 1.5, 0, 1)[:, None]
        fat[i, py, px] += inside * (250 - fat[i, py, px]) - rim * np.array((40, 70, 50), np.float32)
    image[rows] = fat
    return image


def _mucin(image, mucin, size, rng):
    """Paint a pale blue pool into the images `mucin` (n,) bool; returns where, (images, size, size) of 0 and 1."""
    rows = np.flatnonzero(mucin)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    cx, cy, r = (rng.uniform(a, b, len(rows)).astype(np.float32)[:, None, None] for a, b in ((.3, .7), (.3, .7), (.25, .35)))
    alpha = np.clip((r * (1 + .15 * _cloud(len(rows), size, 5, rng)) - np.hypot(x - cx, y - cy)) * size / 3, 0, 1)
    pool = np.array((176, 206, 230), np.float32) + 6 * _cloud(len(rows), size, 12, rng)[..., None]
    image[rows] += (.8 * alpha)[..., None] * (pool - image[rows])
    return (alpha > .5).astype(np.uint8)


def _draw_cells(image, instances, rows, cell, middle, number, f, rng):
    """Paint one cell of a kind at `middle` (rows, 2: x, y) into each of the images `rows`, and its number into `instances`."""
    _, _, radii, (nucleus, relative), cytoplasm, granules = cell
    m, size, half = len(rows), image.shape[1], int(np.ceil(14 * f))
    r = (rng.uniform(*radii, m) * f).astype(np.float32)[:, None, None]
    corner = np.round(middle).astype(int) - half
    step = np.arange(2 * half)
    py, px = corner[:, 1, None, None] + step[:, None], corner[:, 0, None, None] + step    # (m, w, 1), (m, 1, w)
    angle = rng.uniform(0, 2 * np.pi, m).astype(np.float32)[:, None, None]
    dx, dy = (px - middle[:, 0, None, None]).astype(np.float32), (py - middle[:, 1, None, None]).astype(np.float32)
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx         # (m, w, w), in pixels
    rough = 1 + .06 * _cloud(m, 2 * half, 6, rng)

    def disc(radius, x=0., y=0., stretch=1.):
        return np.clip((radius * rough - np.hypot((u - x) / stretch, v - y)) + .5, 0, 1)
    rn = relative * r
    dark = {"round": lambda: disc(rn), "aside": lambda: disc(rn, .38 * r), "long": lambda: disc(.3 * r, stretch=3.2),
            "nucleolus": lambda: disc(rn), "crescent": lambda: disc(rn) * (1 - disc(.55 * rn, .75 * rn)),
            "cap": lambda: disc(rn) * (1 - disc(.95 * rn, -.4 * rn)), "plate": lambda: disc(.22 * r, stretch=3.),
            "lobes 2": lambda: np.maximum(disc(rn, -.42 * r), disc(rn, .42 * r)),
            "lobes 3": lambda: np.maximum.reduce([disc(rn * .9, .48 * r * np.cos(a), .48 * r * np.sin(a))
                                                  for a in (0.3, 2.2, 4.4)])}[nucleus]()
    body = dark if cytoplasm is None else disc(r)
    inside = (py >= 0) & (py < size) & (px >= 0) & (px < size)
    y, x, i = np.clip(py, 0, size - 1), np.clip(px, 0, size - 1), rows[:, None, None]
    window = image[i, y, x]                                                                 # (m, w, w, 3), a copy
    if cytoplasm is not None:
        tint = np.array(cytoplasm, np.float32) + 4 * _cloud(m, 2 * half, 8, rng)[..., None]
        window += body[..., None] * (tint - window)
        if granules is not None:
            spots = body * (1 - dark) * (rng.random(body.shape) < .4)
            window += .85 * spots[..., None] * (np.array(granules, np.float32) - window)
    chromatin = NUCLEUS * (.62 if nucleus == "plate" else 1) + 14 * _cloud(m, 2 * half, 12, rng)[..., None]
    window += .95 * dark[..., None] * (chromatin - window)
    if nucleus == "nucleolus":
        window += .8 * disc(.2 * r, .2 * r)[..., None] * (np.array((60, 14, 80), np.float32) - window)
    take = np.nonzero(inside & (body > .02))                 # each pixel once: clipped ones, outside, would repeat the rim
    where = rows[take[0]], y[take[0], take[1], 0], x[take[0], 0, take[2]]
    image[where] = window[take]
    take = np.nonzero(inside & (body > .5))
    instances[rows[take[0]], y[take[0], take[1], 0], x[take[0], 0, take[2]]] = number[take[0]]


def _stain(image, slides, rng):
    """Each slide's own dye strengths, brightness and focus: float images -> uint8."""
    out = np.empty(image.shape, np.uint8)
    for slide in np.unique(slides):
        rows, blur = slides == slide, rng.uniform(0, 1.)
        dye = rng.uniform(.8, 1.25, 3) * rng.uniform(.85, 1.15)
        part = scipy.ndimage.gaussian_filter(image[rows], (0, blur, blur, 0)) if blur > .3 else image[rows]
        out[rows] = (255 * (np.clip(part, 1, 255) / 255) ** dye.astype(np.float32)).astype(np.uint8)
    return out


def _caption(kinds, ground, mucin, rng):
    """A sentence on a field, from a small grammar; about a fifth of the facts go unsaid."""
    def pick(*options):
        return options[rng.integers(len(options))]
    found = []
    for k in dict.fromkeys(kinds.tolist()):
        name, many = CELLS[k][0], (kinds == k).sum()
        plural = "mitoses" if name == "mitosis" else name + "s"
        if rng.random() < .85:
            found.append(f"{pick('an' if name[0] == 'e' else 'a', 'one')} {name}" if many == 1 else
                         f"{pick(('two', 'three', 'four')[many - 2], 'several')} {plural}")
    if mucin and rng.random() < .85:
        found.append(pick("mucin", "a pool of mucin"))
    where = pick("in", "within", "on") + " " + (("pale stroma", "fibrous stroma", "fat vacuoles")[ground])
    text = ", ".join(found[:-1]) + (" and " if len(found) > 1 else "") + found[-1] if found else pick("a field", "tissue")
    return pick("", "", "a field with ", "microscopy of ") + text + (f" {where}" if rng.random() < .7 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------

class Words:
    """A word-level tokenizer: 0 pads, words count from 1 in alphabetical order, then `start` and, highest, `end`.

    words: the vocabulary, or None to take every word of `captions` that stands in two or more of them.
    """

    def __init__(self, captions=None, words=None):
        if words is None:
            seen = {}
            for text in captions:
                for word in set(self.split(text)):
                    seen[word] = seen.get(word, 0) + 1
            words = sorted(w for w, n in seen.items() if n > 1)
        if not words:
            raise InputError("no word stands in two captions - give more captions")
        self.words = list(words)
        self.number = {w: i + 1 for i, w in enumerate(self.words)}
        self.start, self.end, self.size = len(words) + 1, len(words) + 2, len(words) + 3

    @staticmethod
    def split(text):
        return re.findall(r"[\w']+", str(text).lower())

    def pieces(self, text, strict=True):
        """[(token, (number of the word, word))] of a text; an unknown word raises InputError if `strict`, else is left out."""
        words = self.split(text)
        unknown = [w for w in words if w not in self.number]
        if strict and unknown:
            raise InputError(f"the word '{unknown[0]}' is in no caption that the text encoder learned from - use others")
        return [(self.number[w], (i, w)) for i, w in enumerate(words) if w in self.number]

    def __call__(self, texts, context, strict=True):
        """(n, context) int64: start, words, end, zeros; a text that is too long loses its last words."""
        out = np.zeros((len(texts), context), np.int64)
        for i, text in enumerate(texts):
            row = [self.start, *(token for token, _ in self.pieces(text, strict)[:context - 2]), self.end]
            out[i, :len(row)] = row
        return torch.from_numpy(out)


class Merges(Words):
    """CLIP's own tokenizer: a word starts as its bytes, and of neighbours the pair that stands first in the list is merged,
    again and again (byte-pair encoding, Sennrich et al. 2016). Knows every text.

    merges: list of pairs "a b", lines 2 to 48,895 of CLIP's bpe_simple_vocab_16e6.txt (`read_merges`). Tokens are numbered:
    256 bytes, the same at the end of a word, merges, start, end. Letters and digits are Python's, not Unicode's L and N, and
    broken text is not mended first (CLIP's ftfy and html.unescape).
    """

    def __init__(self, merges):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]                   # other bytes: letters from 256 on
        rest = [b for b in range(256) if b not in printable]
        self.letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
        pairs = [tuple(line.split()) for line in merges]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise InputError("a merges file has two pieces a line - give CLIP's bpe_simple_vocab_16e6.txt.gz")
        names = [*self.letter.values(), *(v + "</w>" for v in self.letter.values()), *map("".join, pairs)]
        self.words, self.rank = list(merges), {pair: i for i, pair in enumerate(pairs)}
        self.number = {name: i for i, name in enumerate(names)}
        self.start, self.end, self.size = len(names), len(names) + 1, len(names) + 2

    @staticmethod
    def split(text):
        text = " ".join(str(text).lower().split())
        return re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", text)

    def merged(self, word):
        """The pieces of a word."""
        pieces = [self.letter[b] for b in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            first = min(zip(pieces, pieces[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if first not in self.rank:
                break
            out = []
            for piece in pieces:                             # join it wherever it stands, from the left
                if out and (out[-1], piece) == first:
                    out[-1] = "".join(first)
                else:
                    out.append(piece)
            pieces = out
        return pieces

    def pieces(self, text, strict=True):
        return [(self.number[piece], (i, word)) for i, word in enumerate(self.split(text)) for piece in self.merged(word)]


def latent_semantics(captions, known, longest=1, width=32):
    """Latent semantic analysis (Deerwester et al. 1990): a text encoder that never saw a picture. (N, width) float32.

    Counts of words, and of runs of up to `longest` words, times the log of how rare they are, scaled to length 1 and projected
    on the first right singular vectors of the rows `known`, fewer where these span fewer; what stands in none of these is not counted.
    """
    grams = []
    for text in captions:
        words = Words.split(text)
        grams.append([" ".join(words[i:i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)])
    number = {gram: j for j, gram in enumerate(sorted({gram for i in known for gram in grams[i]}))}
    if len(number) < 2 or len(known) < 2:
        raise InputError("the captions to learn from hold fewer than two words - give more captions")
    cells = [(i, number[gram]) for i, found in enumerate(grams) for gram in found if gram in number]
    counts = scipy.sparse.csr_matrix((np.ones(len(cells)), tuple(zip(*cells))), (len(grams), len(number)))
    counts = counts.multiply(np.log(len(known) / (counts[known] > 0).sum(0)) + 1).tocsr()
    length = np.sqrt(counts.multiply(counts).sum(1))
    counts = scipy.sparse.diags(1 / np.maximum(np.asarray(length).ravel(), 1e-12)) @ counts
    width = min(width, len(number) - 1, len(known) - 1)
    start = np.ones(min(len(number), len(known)))
    _, values, axes = scipy.sparse.linalg.svds(counts[known], width, v0=start)
    axes = axes[values > 1e-6 * values.max()][::-1]          # beyond the rank any vector would do
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]            # so that they are always the same
    return (counts @ axes.T).astype(np.float32)


def read_merges(path):
    """The merges of CLIP's file, plain or gzipped, without its first line; raises InputError when it cannot be read."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(plain_file(path), "rt", encoding="utf-8") as f:
            return f.read().splitlines()[1:48895]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise InputError(f"{path} is not a readable merges file ({type(e).__name__}) - give CLIP's "
                         "bpe_simple_vocab_16e6.txt.gz")


# ---------------------------------------------------------------------------------------------------------------------
# Images, and DINO's crops of them (thesis 3.2.1; Caron et al. 2021, section 3)
# ---------------------------------------------------------------------------------------------------------------------

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # mean and standard deviation of R, G, B in 0..1
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)    # the same of OpenAI's CLIP
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@functools.cache
def vision():
    """torchvision, imported late. A CUDA build of it beside a CPU build of torch lacks two operators, which nothing
    here needs, and refuses to be imported without them: then they are declared, and it is imported again."""
    try:
        import torchvision.transforms
    except RuntimeError as e:
        if "torchvision::nms" not in str(e):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        # kept, because its operators go when it does
        vision.library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            vision.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.transforms
    return torchvision


@dataclass
class Images:
    """Pictures and what is known about them: paths (list of N), labels (N,) int, or (N, C) bool, or None, label_names, split
    (N,) or None; boxes (N, 4) int, x, y, width, height in its file's pixels, where a picture is a part of one, else None;
    mask (N,) bool as in `Features`, or None; pixels (N, H, W[, 3]) uint8 where the file holds them;
    objects: a list of N lists of (name, (x0, y0, x1, y1) in shares of the picture), where they are annotated; about: other
    reserved keys of a feature file that came with the pictures."""
    paths: list
    labels: np.ndarray = None
    label_names: list = field(default_factory=list)
    split: np.ndarray = None
    boxes: np.ndarray = None
    objects: list = None
    about: dict = field(default_factory=dict)
    side: int = 224                                          # pixels that a part needs, at least, where a slide has levels
    window: tuple = None                                     # see `as_rgb`
    mask: np.ndarray = None
    pixels: np.ndarray = None
    notes: list = field(default_factory=list)                # lines the user should see

    def open(self, i):
        """Picture i in RGB."""
        if self.pixels is not None:
            return as_rgb(Image.fromarray(self.pixels[i]), self.window)
        if self.boxes is not None:
            return _slide(self.paths[i], self.window).read(self.boxes[i], self.side)
        return open_image(self.paths[i], window=self.window)

    def __len__(self):
        return len(self.paths)

    @property
    def whole(self):
        """Whether views must not cut anything off: tiles have no margin, and boxes are shares of the whole picture."""
        return self.boxes is not None or self.objects is not None or "boxes" in self.about

    @property
    def labelled(self):
        """(N,) bool: the pictures whose labels are known; none without labels."""
        return _labelled(self.labels, self.mask, len(self))

    def rows(self, *splits):
        return np.flatnonzero(np.isin(self.split, splits)) if splits else np.arange(len(self))

    def knn_rows(self, seed, most):
        """Pictures that vote and pictures that are judged, some, if many: train against the other
        splits, else 80 / 20, groups whole."""
        rng = np.random.default_rng([seed, 8])
        split = _split(self.split, self.about.get("groups"), len(self), seed)
        return [np.sort(rng.permutation(np.flatnonzero(part))[:most]) for part in (split == "train", split != "train")]

    @property
    def hash(self):
        """Changes with the files' names, their folders' and sizes, not with where all of it lies."""
        told = "\n".join(f"{os.path.join(*p.split(os.sep)[-2:])} {os.path.getsize(p)}" for p in self.paths)
        inside = [a for a in (self.boxes, self.pixels) if a is not None]
        return _digest(np.frombuffer(told.encode(), np.uint8), *inside)


def read_images(path):
    """A folder of pictures, or of one level of class folders, optionally inside train, val and test folders; a single large
    picture, which is cut into tiles (`tile_slide`'s defaults); an .npz of tiles as the `tile` command writes it, or a
    folder of such; an .npz with `images` and other keys of a feature file, as `tissue` writes it;
    or a Pascal VOC folder, which brings its splits and its objects.

    Every file of a folder is opened to see that it is a picture, and none is decoded. Raises InputError for a missing or
    empty folder, and for a file that cannot be read or is too large to be meant as one picture, by name.
    """
    if os.fspath(path).endswith(".npz"):
        return _read_tiles([path]) if "coords" in _Source(path) else _read_listed(path)
    if os.path.isfile(path):
        if min(_slide(path).size) < 448:                     # hardly two tiles: one picture
            return Images([path])
        boxes, _ = tile_slide(path)
        return Images([path] * len(boxes), boxes=boxes)
    tiles = sorted(f for f in os.listdir(path) if f.endswith(".npz")) if os.path.isdir(path) else []
    if tiles:
        return _read_tiles([os.path.join(path, f) for f in tiles])
    if os.path.isdir(os.path.join(path, "ImageSets", "Main")):
        return _read_voc_images(path)
    paths, labels, names, split, notes = _walk(path, PICTURES, "pictures")
    for p in paths:
        open_image(p, decode=False)
    return Images(paths, labels, names, split, notes=notes)


def _read_listed(path):
    """Pictures that an .npz holds in `images`, or names there, relative to itself, with what else
    it says of them."""
    arrays = read_arrays(path)
    if "images" not in arrays or not arrays["images"].size:
        raise InputError(f"{path} lacks 'images', paths of pictures, or 'coords' of tiles - name another file")
    n = len(np.atleast_1d(arrays["images"]))
    about = _about(arrays, n)
    images, given = about.pop("images"), about.pop("split", None)
    labels, names, mask = _read_labels(arrays, n)
    about.update({k: arrays[k] for k in ("boxes", "grid") if k in arrays})
    out = Images([path] * n, labels, names, None if given is None else _split(given, None, n, 0),
                 about=about, mask=mask)
    out.notes += _torn_groups(out.split, about.get("groups"))
    if images.ndim > 1:
        out.pixels = images
        return out
    out.paths = [os.path.join(os.path.dirname(os.path.abspath(path)), p) for p in images]
    for p in out.paths:
        open_image(p, decode=False)
    return out


def _read_voc_images(folder):
    """The pictures of a Pascal VOC folder with their objects."""
    paths, split, objects = [], [], []
    for name, stem in voc_stems(folder):
        paths.append(os.path.join(folder, "JPEGImages", f"{stem}.jpg"))
        split.append(name)
        sides = np.array(open_image(paths[-1]).size * 2)
        objects.append([(label, tuple(np.clip(box / sides, 0, 1)))
                        for label, box in read_voc(os.path.join(folder, "Annotations", f"{stem}.xml"))])
    return Images(paths, split=np.array(split), objects=objects)


def voc_stems(folder):
    """[(split, name of a picture without its ending)] of a Pascal VOC folder, as ImageSets/Main lists them."""
    found = []
    for part, split in (("trainval", "train"), ("test", "test")):
        listed = os.path.join(folder, "ImageSets", "Main", f"{part}.txt")
        if not os.path.exists(listed):
            raise InputError(f"no {listed} - expected a Pascal VOC folder: ImageSets/Main, Annotations, JPEGImages")
        with open(plain_file(listed), errors="replace") as f:
            found += [(split, stem) for stem in f.read().split()]
    for _, stem in found:
        if os.path.basename(stem) != stem or not stem.isprintable():                        # it names files that are written
            raise InputError(f"{folder} lists a picture {stem!r} - list plain names, without folders and endings")
    return found


PARTS = {**{s: s for s in SPLITS}, "valid": "val", "validation": "val"}    # folder -> split


def _hidden(name):
    """Whether a file or folder is none of the user's: .ipynb_checkpoints, ._x.png, __MACOSX."""
    return name.startswith((".", "__MACOSX"))


def _files(folder, endings):
    """[(folder, name)] of what has one of the endings, at any depth, through links, hidden things
    left out."""
    found = []
    for where, inside, files in os.walk(folder, followlinks=True):
        real = [os.path.realpath(os.path.join(where, name)) for name in inside]
        inside[:] = sorted(name for name, to in zip(inside, real) if not _hidden(name)
                           and os.path.commonpath([to, os.path.realpath(where)]) != to)    # a loop
        found += [(where, f) for f in sorted(files)
                  if not _hidden(f) and f.lower().endswith(endings)]
    return found


def _split_folders(folder, endings):
    """[(split, folder)] of the train, val (valid, validation) and test folders in a folder, or
    itself with None; raises InputError for what lies beside them and so would be passed over."""
    inside = sorted(f for f in os.listdir(folder) if os.path.isdir(os.path.join(folder, f)))
    if not {*inside} & {*SPLITS}:
        return [(None, folder)]
    parts = [(PARTS[f], os.path.join(folder, f)) for f in inside if f in PARTS]
    beside = [(where, f) for where, f in _files(folder, endings)
              if os.path.relpath(where, folder).split(os.sep)[0] not in PARTS]
    if beside:
        raise InputError(f"{os.path.join(*beside[0])} lies beside the folder {parts[0][1]} - move "
                         "it into a train, val or test folder, or elsewhere")
    return parts


def _without_masks(files):
    """[(folder, name)] without the segmentations that lie beside their pictures, as in BUSI:
    X_mask.png and X_mask_1.png where there is an X; and how many those are."""
    stems = {(where, os.path.splitext(f)[0]) for where, f in files}

    def is_mask(where, f):
        picture = re.fullmatch(r"(.+)_mask(_\d+)?", os.path.splitext(f)[0])
        return f.lower().endswith(PICTURES) and picture and (where, picture[1]) in stems
    kept = [(where, f) for where, f in files if not is_mask(where, f)]
    return kept, len(files) - len(kept)


def _walk(folder, endings, what):
    """Files of a folder laid out as `read_images` says: paths, labels (N,) or None, label names,
    split (N,) or None, notes for the user."""
    if not os.path.isdir(folder):
        raise InputError(f"no folder {folder} - name a folder of {what}, or of class folders of {what}")
    parts = _split_folders(folder, endings)
    found, masks = [], 0                                     # (path, class folder or "", split)
    for split, part in parts:
        files, n = _without_masks(_files(part, endings))
        masks += n
        for where, f in files:
            under = os.path.relpath(where, part)
            if os.sep in under:
                raise InputError(f"{where} lies deeper than one level of class folders - move its {what} up")
            found.append((os.path.join(where, f), "" if under == "." else under, split))
    if not found:
        raise InputError(f"no {what} in {folder} - expected {', '.join(endings)}")
    names = sorted({name for _, name, _ in found})
    labelled = names != [""]
    if labelled and "" in names:
        stray = next(path for path, name, _ in found if not name)
        raise InputError(f"{stray} lies beside class folders - move it into one, or remove the folders")
    return ([path for path, _, _ in found], np.array([names.index(name) for _, name, _ in found]) if labelled else None,
            names if labelled else [],
            None if parts[0][0] is None else np.array([split for *_, split in found]),
            [f"{folder}: {masks} masks (X_mask.png beside X.png) are left out"] if masks else [])


def open_image(path, decode=True, window=None):
    """A picture as `as_rgb` gives it; without `decode` it is only looked at.

    Raises InputError naming the file.
    """
    try:
        image = Image.open(plain_file(path))
        return as_rgb(image, window) if decode else image.close()
    except Image.DecompressionBombError:
        raise InputError(f"{path} is too large for one picture - cut it with `tile`, for which it needs openslide")
    except InputError:
        raise
    except Exception as e:                                   # Pillow's many kinds for broken tags
        raise InputError(f"{path} is not a readable picture ({str(e) or type(e).__name__}) - remove or replace it")


def as_rgb(image, window=None):
    """A PIL image in RGB, upright as its EXIF orientation says.

    Grey of more than 8 bits is scaled: low becomes black, high white, what lies beyond is cut off.
    They are `window`, (low, high), where it is given, which then holds for grey of 8 bits too and
    leaves colours alone; else of whole numbers `_whole_range`, of floating ones the picture's own
    least and largest finite value.
    """
    tags = dict(getattr(image, "tag_v2", {}))
    image = ImageOps.exif_transpose(image)
    if image.mode[0] not in "IF" and not (window and image.mode == "L"):
        return image.convert("RGB")
    x = np.asarray(image).astype(np.float64)
    if window:
        low, high = window
    elif image.mode == "F":
        finite = x[np.isfinite(x)]
        low, high = finite.min(initial=np.inf), finite.max(initial=-np.inf)
    else:
        low, high = _whole_range(x, tags)
    share = (np.nan_to_num(x, nan=low) - low) / (high - low) if high > low else np.zeros_like(x)
    if image.mode.startswith("I;16") and tags.get(262) == 0:     # TIFF: the least value is white
        share = 1 - share
    return Image.fromarray((255 * share.clip(0, 1)).round().astype(np.uint8)).convert("RGB")


def _whole_range(x, tags):
    """(low, high) of a picture of whole numbers x (H, W), from its TIFF tags, if any.

    The least and largest value it states (SMin- and SMaxSampleValue, else Min- and MaxSampleValue);
    else all that its stated bits hold, if those are fewer than 16; else the first of 0..4095 (12
    bits in 16, as detectors have) and 0..65535 that holds all its values; else their own range.
    """
    low, high = (float(np.ravel(tags.get(signed, tags.get(plain, default)))[0])
                 for signed, plain, default in ((340, 280, 0), (341, 281, 0)))
    bits = int(np.ravel(tags.get(258, 16))[0])
    if low < high:
        return low, high
    for most in (2 ** bits - 1,) if bits < 16 else (4095, 65535):
        if 0 <= x.min() and x.max() <= most:
            return 0, most
    return x.min(), x.max()


def plain_view(size, whole=False):
    """The transform for judging, Image -> (3, size, size): shorter side to 8/7 of `size`, centre crop, normalised. With
    `whole` nothing is cut off: tiles have no margin."""
    t = vision().transforms
    side = (size, size) if whole else round(size * 8 / 7)
    return t.Compose([t.Resize(side, t.InterpolationMode.BICUBIC), t.CenterCrop(size), t.ToTensor(), t.Normalize(*IMAGENET)])


def pixel_statistics(images, rows, most=500, side=64):
    """Mean and standard deviation (3,) of R, G, B in 0..1, of pictures spread evenly over `rows`."""
    chosen = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]
    pixels = np.stack([np.asarray(images.open(i).resize((side, side))) for i in chosen]).reshape(-1, 3) / 255
    return pixels.mean(0), np.maximum(pixels.std(0), 1e-3)


class Crops:
    """DINO's random views of one image: `Crops(...)(image)` -> list of tensors (3, size, size), the two global first.

    size, local_size    sides in pixels          scale, local_scale    share of the image's area that a crop covers
    blur                largest radius of the Gaussian blur: 2 px suits 224 px, smaller images want less
    colour              strength of colour jitter, grey and solarised views: 1 is DINO's; less where colour matters
    pathology           vertical flips, right-angle turns and mild stain jitter as well: ours, for tissue and cells
    All randomness comes from torch's global generator.
    """

    def __init__(self, size=224, local_size=96, n_local=8, scale=(0.4, 1.), local_scale=(0.05, 0.4), blur=2., colour=1.,
                 pathology=False):
        t = vision().transforms
        extra = [t.RandomVerticalFlip(), t.Lambda(quarter_turns), t.Lambda(stain_jitter)] if pathology else []
        jitter = t.ColorJitter(0.4 * colour, 0.4 * colour, 0.2 * colour, 0.1 * colour)
        change = [t.RandomHorizontalFlip(), *extra, t.RandomApply([jitter], 0.8), t.RandomGrayscale(0.2 * colour)]
        end = [t.ToTensor(), t.Normalize(*IMAGENET)]

        def view(side, area, blur_share, *more):
            crop = t.RandomResizedCrop(side, area, interpolation=t.InterpolationMode.BICUBIC)
            blurred = t.RandomApply([t.Lambda(functools.partial(random_blur, most=blur))], blur_share)
            return t.Compose([crop, *change, blurred, *more, *end])
        self.views = [view(size, scale, 1.), view(size, scale, 0.1, t.RandomSolarize(128, 0.2 * colour)),
                      *[view(local_size, local_scale, 0.5)] * n_local]

    def __call__(self, image):
        return [view(image) for view in self.views]


def random_blur(image, most):
    """Gaussian blur of a random radius, from 0.1 (or `most`, if less) to `most` pixels."""
    return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(min(0.1, most), most).item()))


def quarter_turns(image):
    """A random number of right-angle turns."""
    return image.rotate(90 * int(torch.randint(4, (1,))))


# Optical density of R, G, B per unit of haematoxylin, eosin and DAB: Ruifrok & Johnston 2001
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def stain_jitter(image, strength=0.05):
    """Scale and shift the amount of each stain by up to `strength` (Tellez et al. 2018)."""
    density = -np.log((np.asarray(image, np.float64) + 1) / 256)                            # (H, W, 3)
    scale, shift = torch.empty(2, 3).uniform_(-strength, strength).double().numpy()
    density = (density @ np.linalg.inv(STAINS) * (1 + scale) + shift) @ STAINS
    return Image.fromarray((256 * np.exp(-density) - 1).round().clip(0, 255).astype(np.uint8))


class CropBatches(torch.utils.data.Dataset):
    """Item (step, i): the views of image i as they are drawn in that step. Its own seed makes an item the same whoever
    asks, in whatever order: so a resumed run sees what the uninterrupted one saw, with any number of workers."""

    def __init__(self, images, crops, seed):
        self.images, self.crops, self.seed = images, crops, seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        step, i = item
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, 7, step, i]).generate_state(1, np.uint64)[0] >> 1))
            return self.crops(self.images.open(i))


def crop_batches(images, crops, batches, seed, first, last, workers=0):
    """Iterate over steps first .. last - 1: a list of V tensors (B, 3, h, w). batches: a `Batches` over the images."""
    steps = [[(step, int(i)) for i in batches.rows(step)] for step in range(first, last)]
    return iter(torch.utils.data.DataLoader(CropBatches(images, crops, seed), batch_sampler=steps, num_workers=workers,
                                            worker_init_fn=_forget_slides))


@dataclass
class Pictures:
    """Small pictures in memory: pixels (N, 3, S, S) uint8, labels (N,) int, label_names, split (N,)
    or None, groups (N,) or None, notes as in `Images`."""
    pixels: np.ndarray
    labels: np.ndarray
    label_names: list
    split: np.ndarray = None
    groups: np.ndarray = None
    notes: list = field(default_factory=list)

    @property
    def hash(self):
        return _digest(self.pixels, self.labels)


def _digest(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


def read_pictures(path, size, label=None, window=None):
    """Labelled pictures at size x size: class folders, or an .npz that lists pictures, as `read_images` reads them; or a
    MedMNIST .npz with train_images, train_labels and so on for val and test. Where several labels hold at once, `label` is the
    name of the one to find. window: see `as_rgb`. Raises InputError when there are no labels, or
    only one class."""
    groups, notes = None, []
    if os.path.isdir(path) or "images" in _Source(path):
        images = read_images(path)
        images.window = window
        if images.labels is None:
            raise InputError(f"{path} has no labels - put the pictures into folders named after them")
        labels, names, split = images.labels, images.label_names, images.split
        if labels.ndim == 1 and label:
            raise InputError(f"{path} has one label a picture - leave out --label")
        if labels.ndim == 2:
            if label not in names:
                raise InputError(f"{path}: no label '{label}' - name one with --label: {', '.join(names)}")
            labels, names = labels[:, names.index(label)].astype(int), [f"no {label}", label]
        known = np.flatnonzero(images.labelled)
        views, labels, split = map(images.open, known), labels[known], split if split is None else split[known]
        if "groups" in images.about:
            groups = images.about["groups"][known]
        notes = images.notes
    else:
        arrays = _Source(path)
        there = [s for s in SPLITS if f"{s}_images" in arrays and f"{s}_labels" in arrays]
        if not there:
            raise InputError(f"{path} lacks train_images and train_labels - give a MedMNIST .npz, or class folders")
        given = {s: arrays[f"{s}_images"] for s in there}
        labels = [np.asarray(arrays[f"{s}_labels"]) for s in there]
        for (s, x), v in zip(given.items(), labels):
            if v.size != len(x) or not np.issubdtype(v.dtype, np.integer) or v.min() < 0:
                raise InputError(f"'{s}_labels' has shape {v.shape} and type {v.dtype} for {len(x)} pictures - give one class "
                                 "each, from 0; several at once are not served")
            if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] != 3):
                raise InputError(f"'{s}_images' has shape {x.shape} and type {x.dtype} - give uint8 (N, H, W) or (N, H, W, 3)")
        labels = np.concatenate([v.ravel() for v in labels]).astype(int)
        views = (as_rgb(Image.fromarray(v), window) for x in given.values() for v in x)
        names, split = [str(c) for c in range(labels.max() + 1)], np.repeat(there, [len(x) for x in given.values()])
    if len(np.unique(labels)) < 2:
        raise InputError(f"{path} has the one class {names[labels[0]]} - there is nothing to tell apart")
    pixels = np.stack([np.asarray(v.resize((size, size), Image.BICUBIC)).transpose(2, 0, 1) for v in views])
    return Pictures(pixels, labels, names, split, groups, notes)


def normalised(pixels):
    """(N, 3, S, S) uint8 -> float tensor, normalised as ImageNet."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def jittered(x):
    """Each picture of a batch (B, 3, S, S) mirrored by chance and shifted by up to an eighth, its edge repeated."""
    side, pad = x.shape[-1], x.shape[-1] // 8
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    x = torch.nn.functional.pad(x, [pad] * 4, mode="replicate")
    at = torch.randint(0, 2 * pad + 1, (len(x), 2)).tolist()
    return torch.stack([v[:, i:i + side, j:j + side] for v, (i, j) in zip(x, at)])


# ---------------------------------------------------------------------------------------------------------------------
# Slides: tissue, tiles and regions of interest (thesis 3.2.2; CLAM, Lu et al. 2021)
# ---------------------------------------------------------------------------------------------------------------------

class Slide:
    """A large picture: through openslide where that is installed and knows the file, else through Pillow, in memory."""

    def __init__(self, path, window=None):
        self.slide = None
        try:
            import openslide
            self.slide = openslide.OpenSlide(path)
            self.size = self.slide.dimensions
        except (ImportError, OSError, ValueError):           # not installed, or a plain picture
            pass
        except Exception as e:                               # openslide's own errors
            if "Unsupported" not in type(e).__name__:
                raise InputError(f"{path} is not a readable slide ({e}) - write it again")
        if self.slide is None:
            self.image = open_image(path, window=window)
            self.size = self.image.size

    def overview(self, side):
        """The whole slide in RGB with a longer side of at most `side`, and how many of its pixels one of that spans."""
        scale = max(1., max(self.size) / side)
        small = tuple(max(1, round(v / scale)) for v in self.size)
        image = self.slide.get_thumbnail(small) if self.slide else self.image.resize(small, Image.BOX)
        return image.convert("RGB"), scale

    def read(self, box, side=224):
        """x, y, width, height of the slide in RGB, from the coarsest level on which it is at least `side` pixels wide."""
        x, y, w, h = map(int, box)
        if self.slide is None:
            return self.image.crop((x, y, x + w, y + h))
        level = self.slide.get_best_level_for_downsample(max(1., w / side))
        shrink = self.slide.level_downsamples[level]
        return self.slide.read_region((x, y), level, (round(w / shrink), round(h / shrink))).convert("RGB")


@functools.lru_cache(maxsize=4)
def _slide(path, window=None):
    return Slide(path, window)


def _forget_slides(worker):
    """A process that makes crops opens its slides itself: a file handle must not be shared."""
    _slide.cache_clear()


def slide_files(path):
    """A slide's path as a list, or the slides in a folder, class folders included, none of them
    opened; and a list of notes for the user."""
    endings = (*PICTURES, ".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".bif")
    if not os.path.isdir(path):
        return [path], []
    paths, _, _, _, notes = _walk(path, endings, "slides")
    return paths, notes


def otsu(values):
    """The threshold that splits uint8 values into the two classes with the largest variance between them (Otsu 1979)."""
    count = np.bincount(np.ravel(values), minlength=256).astype(float)
    below, total = np.cumsum(count), np.cumsum(count * np.arange(256))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (total[-1] * below - total * below[-1]) ** 2 / (below * (below[-1] - below))
    return int(np.nanargmax(np.where(np.isfinite(between), between, -1)))


def find_tissue(rgb, threshold=8, median=7, close=4, least=16, least_hole=16, max_holes=8):
    """Pieces of tissue in an overview, as CLAM finds them: saturation, median filter, threshold, closing, size.

    rgb (H, W, 3) uint8. threshold of the saturation (0..255), None for Otsu's; median, close: sides of the filters;
    least: pixels of a piece without its holes; of each piece the `max_holes` largest holes of more than `least_hole`
    pixels stay holes, all others are filled. Returns (H, W) int: 0 outside, i inside piece i, -i in a hole of it.
    """
    saturation = scipy.ndimage.median_filter(np.asarray(Image.fromarray(rgb).convert("HSV"))[..., 1], median)
    mask = scipy.ndimage.binary_dilation(saturation > (otsu(saturation) if threshold is None else threshold),
                                         np.ones((close, close)))
    mask = scipy.ndimage.binary_erosion(mask, np.ones((close, close)), border_value=1)
    eight = np.ones((3, 3))
    label, _ = scipy.ndimage.label(mask, eight)
    out, n = np.zeros(mask.shape, np.int32), 0
    for i, where in enumerate(scipy.ndimage.find_objects(label), 1):
        piece = label[where] == i
        if piece.sum() <= least:
            continue
        n += 1
        holes, _ = scipy.ndimage.label(scipy.ndimage.binary_fill_holes(piece) & ~piece)
        size = np.bincount(holes.ravel())[1:]
        stay = [j + 1 for j in np.argsort(-size, kind="stable")[:max_holes] if size[j] > least_hole]
        out[where][piece | (holes > 0)] = n
        out[where][np.isin(holes, stay)] = -n
    return out


def tile_boxes(pieces, scale, size, side, step):
    """Tiles of the tissue, as CLAM lays them: (n, 4) int, x, y, width, height in pixels of the slide.

    pieces: from `find_tissue`, one of whose pixels spans `scale` of the slide's, whose size is (width, height). Each piece
    has a grid of its own, from the corner of its bounding box. A tile is kept if one of the four points halfway from its
    centre to its corners is inside the piece's outline, and its centre in no hole. Unlike CLAM's, none reaches over the edge.
    """
    def at(x, y):
        row, column = (np.clip((v / scale).astype(int), 0, n - 1) for v, n in zip((y, x), pieces.shape))
        return pieces[row, column]
    found = [np.zeros((0, 4), int)]
    for i, (rows, columns) in enumerate(scipy.ndimage.find_objects(np.abs(pieces)), 1):
        x, y = (np.arange(int(s.start * scale), min(int(s.stop * scale), n - side + 1), step)
                for s, n in ((columns, size[0]), (rows, size[1])))
        x, y = (v.ravel() for v in np.meshgrid(x, y, indexing="ij"))
        cx, cy, q = x + side // 2, y + side // 2, side // 4
        inside = np.any([np.abs(at(cx + a, cy + b)) == i for a in (-q, q) for b in (-q, q)], 0) & (at(cx, cy) != -i)
        found.append(np.stack([x, y, np.full_like(x, side), np.full_like(x, side)], 1)[inside])
    return np.concatenate(found)


def tile_slide(path, side=224, step=None, overview=2048, least=0.2, least_hole=0.2, window=None,
               **how):
    """Tiles of a slide's tissue: boxes (n, 4) as `tile_boxes` gives them, and a picture of the overview with both drawn in.

    side, step: in pixels of the slide. least, least_hole: areas in units of 512 x 512 such pixels, as in CLAM, which takes
    1 and 1 for biopsies, 100 and 16 for resections; ours is about a tile of 224. Raises InputError when there is no tissue.
    window: see `as_rgb`.
    """
    slide = _slide(path, window)
    image, scale = slide.overview(overview)
    area = 512 ** 2 / scale ** 2
    pieces = find_tissue(np.asarray(image), least=least * area, least_hole=least_hole * area, **how)
    boxes = tile_boxes(pieces, scale, slide.size, side, step or side)
    if not len(boxes):
        raise InputError(f"{path} has no tissue for tiles of {side} pixels - lower --threshold, --least or --size")
    edge = (pieces > 0) & ~scipy.ndimage.binary_erosion(pieces > 0, iterations=2)
    shown = np.array(image)
    shown[edge] = (0, 160, 0)
    shown = Image.fromarray(shown)
    draw = ImageDraw.Draw(shown)
    for x, y, w, h in boxes / scale:
        draw.rectangle((x, y, x + w, y + h), outline=(30, 60, 200))
    return boxes, shown


def _read_tiles(files):
    """Tiles as the `tile` command writes them: coords (n, 4), images (n,) paths relative to the file, labels if all have."""
    paths, boxes, labels, masks, label_names = [], [], [], [], []
    for file in files:
        arrays = _Source(file)
        for key in ("coords", "images"):
            if key not in arrays:
                raise InputError(f"{file} lacks '{key}' - name a file that the tile command wrote")
        box, names, here = arrays["coords"], arrays["images"], os.path.dirname(os.path.abspath(file))
        if box.ndim != 2 or box.shape[1] != 4 or names.shape != (len(box),) or not len(box) or box.dtype.kind not in "iuf":
            raise InputError(f"{file}: 'coords' has shape {box.shape} and type {box.dtype} for {names.size} tiles - give x, y, "
                             "width, height each")
        paths += [os.path.join(here, str(name)) for name in names]
        boxes.append(box.astype(int))
        known, label_names, mask = _read_labels(arrays, len(box))
        labels.append(known)
        masks.append(np.ones(len(box), bool) if mask is None else mask)
    labels = np.concatenate(labels) if all(v is not None for v in labels) else None
    mask = None if np.concatenate(masks).all() else np.concatenate(masks)
    return Images(paths, labels, label_names if labels is not None else [],
                  boxes=np.concatenate(boxes), mask=mask)


def read_polygons(path):
    """The regions of an ASAP annotation file (Camelyon's XML): list of ((n, 2) array of x, y in pixels of the slide, inside),
    outer ones first; inside is False for what is cut out of them (Camelyon's group _2)."""
    try:
        root = ElementTree.parse(plain_file(path)).getroot()
        found = [(sorted([float(c.get(k)) for k in ("Order", "X", "Y")] for c in a.iter("Coordinate")),
                  a.get("PartOfGroup") not in ("_2", "Exclusion")) for a in root.iter("Annotation")]
    except (OSError, ElementTree.ParseError, LookupError, TypeError, ValueError) as e:      # lookup: of an encoding
        raise InputError(f"{path} is not a readable ASAP annotation file ({e}) - expected Annotation, Coordinate, Order, X, Y")
    return sorted([(np.array(p)[:, 1:], inside) for p, inside in found if len(p) > 2], key=lambda region: not region[1])


def region_share(regions, box, grid=64):
    """The share of a box, of grid x grid points, that lies in the regions (`read_polygons`).

    The published notebook for PCam-224 took a box of the patch's pixels for one of the slide's, and so looked at a sixteenth
    of each patch (thesis 3.2.2 asks for half of the patch).
    """
    x, y, w, h = map(int, box)
    raster = Image.new("1", (grid, grid))
    for polygon, inside in regions:
        points = (polygon - (x, y)) / (w, h) * grid - 0.5    # of pixels' centres
        if (points.max(0) > -1).all() and (points.min(0) < grid).all():
            ImageDraw.Draw(raster).polygon([tuple(p) for p in points], fill=int(inside))
    return float(np.asarray(raster).mean())


def read_voc(path):
    """The objects of a Pascal VOC annotation: list of (name, (x0, y0, x1, y1))."""
    try:
        sides = [f"bndbox/{k}" for k in ("xmin", "ymin", "xmax", "ymax")]
        found = [(thing.find("name").text, tuple(float(thing.find(side).text) for side in sides))
                 for thing in ElementTree.parse(plain_file(path)).iter("object")]
    except (OSError, ElementTree.ParseError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise InputError(f"{path} is not a readable Pascal VOC annotation ({e}) - expected object, name, bndbox, xmin, ...")
    for name, box in found:
        if not all(map(math.isfinite, box)):
            raise InputError(f"{path} has the box {box} of '{name}' - give finite numbers")
        if not name or os.path.basename(name) != name or not name.isprintable():
            raise InputError(f"{path} names an object '{name}' - a name becomes a folder: take plain words")
    return found


def cut_boxes(folder, out, size=64, margin=0.2, window=None):
    """Cut the annotated boxes of a Pascal VOC folder into pictures out/<split>/<name>/<image>_<i>.png of `size` pixels.

    A cut is the square around a box's centre, as long as the box's longer side and `margin` more, so that shapes stay what
    they are, shifted inwards where it would reach over the image's edge. ImageSets/Main says what is train and what
    test. Boxes with a side of 8 pixels or less are left out. Returns dict (split, name) -> count.
    window: see `as_rgb`.
    """
    count = {}
    for split, stem in voc_stems(folder):
        image = open_image(os.path.join(folder, "JPEGImages", f"{stem}.jpg"), window=window)
        for i, (name, (x0, y0, x1, y1)) in enumerate(read_voc(os.path.join(folder, "Annotations", f"{stem}.xml"))):
            half = max(x1 - x0, y1 - y0) / 2 * (1 + margin)
            if min(x1 - x0, y1 - y0) <= 8:
                continue
            half = min(half, *(v / 2 for v in image.size))
            x, y = (min(max(middle, half), most - half)
                    for middle, most in zip(((x0 + x1) / 2, (y0 + y1) / 2), image.size))
            square = tuple(map(round, (x - half, y - half, x + half, y + half)))
            os.makedirs(os.path.join(out, split, name), exist_ok=True)
            image.crop(square).resize((size, size), Image.BICUBIC).save(os.path.join(out, split, name, f"{stem}_{i}.png"))
            count[split, name] = count.get((split, name), 0) + 1
    return count


# ---------------------------------------------------------------------------------------------------------------------
# Bags of instances
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Bags:
    """Bags of instances: bag i is X[offsets[i]:offsets[i + 1]].

    X (n, d) float32, y (bags,) int, label_names; names (bags,) of the bags; folds (R, F, bags) bool, True = train, or None;
    split (bags,) or None; groups (bags,), patients whose bags stay together, or None;
    coords: list of (N_i, 4) boxes or None, images: list of paths or None: where instances were cut
    """
    X: np.ndarray
    offsets: np.ndarray
    y: np.ndarray
    label_names: list
    names: list
    folds: np.ndarray = None
    split: np.ndarray = None
    coords: list = None
    images: list = None
    groups: np.ndarray = None

    def __len__(self):
        return len(self.y)

    @property
    def hash(self):
        return _digest(self.X, self.offsets, self.y)

    def instances(self, rows):
        """The instances of all bags `rows`, (n, d)."""
        return np.concatenate([self.X[self.offsets[i]:self.offsets[i + 1]] for i in rows])

    def padded(self, rows):
        """x (B, N, d), zeros where a bag is shorter than the longest, mask (B, N), y (B,): tensors."""
        rows = np.asarray(rows)
        size = (self.offsets[1:] - self.offsets[:-1])[rows]
        mask = torch.arange(size.max()) < torch.from_numpy(size)[:, None]
        x = torch.zeros(*mask.shape, self.X.shape[1])
        x[mask] = torch.from_numpy(self.instances(rows))
        return x, mask, torch.from_numpy(self.y[rows]).long()


def read_bags(path, stream=None):
    """An .npz with X (n, d), offsets (bags + 1,), y (bags,) and perhaps folds (R, F, bags) and groups
    (bags,), or a folder with a feature file for each bag, as `extract` writes them, in class folders,
    perhaps inside train, val and test folders.

    Raises InputError for shapes that do not fit, an empty bag, NaN, or a single class.
    """
    bags = _bags_of_folder(path, stream) if os.path.isdir(path) else _bags_of_file(path)
    bad = np.flatnonzero(np.diff(bags.offsets) < 1)
    if len(bad):
        raise InputError(f"bag {bags.names[bad[0]]} is empty - drop it")
    rows = np.flatnonzero(~np.isfinite(bags.X).all(1))
    if len(rows):
        raise InputError(f"instance {rows[0]} holds NaN or Inf - drop or mend it")
    if len(np.unique(bags.y)) < 2:
        raise InputError(f"all bags have the label {bags.y[0]} - there is nothing to learn")
    return replace(bags, X=bags.X.astype(np.float32), y=bags.y.astype(int),
                   label_names=bags.label_names or [str(c) for c in range(bags.y.max() + 1)])


def _bags_of_folder(path, stream):
    """Bags of class folders of feature files, their widths and groups checked."""
    paths, y, label_names, split, _ = _walk(path, (".npz",), "feature files")
    if y is None:
        raise InputError(f"{path} has no class folders - put each bag's file into a folder named "
                         "after its label")
    names = [os.path.splitext(os.path.basename(p))[0] for p in paths]
    parts, coords, images, groups = map(list, zip(*(_read_bag(p, stream) for p in paths)))
    if len({group is None for group in groups}) > 1:
        raise InputError(f"{paths[groups.index(None)]} has no single group, as other bags have - "
                         "give one in each, or none")
    widths = {x.shape[1] for x in parts}
    if len(widths) > 1:
        raise InputError(f"the bags in {path} have widths {sorted(widths)} - extract them with one "
                         "backbone")
    return Bags(np.concatenate(parts), np.cumsum([0, *map(len, parts)]), y, label_names, names,
                split=split, coords=coords, images=images,
                groups=None if None in groups else np.array(groups))


def _bags_of_file(path):
    """Bags of an .npz, the shapes and types of its arrays checked against each other."""
    arrays = _Source(path)
    for key in ("X", "offsets", "y"):
        if key not in arrays:
            raise InputError(f"{path} lacks '{key}' - give X (instances, d), offsets (bags + 1,) and "
                             "y (bags,)")
    X, offsets, y = _instances(path, "X", arrays), arrays["offsets"], arrays["y"]
    folds, groups = arrays.get("folds"), arrays.get("groups")
    if y.ndim != 1 or offsets.ndim != 1 or not len(y) or not len(offsets) \
            or not np.issubdtype(offsets.dtype, np.integer):
        raise InputError(f"'y' has shape {y.shape}, 'offsets' {offsets.shape} of {offsets.dtype} - "
                         "give (bags,) and (bags + 1,) integers")
    offsets = offsets.astype(np.int64)
    if len(offsets) != len(y) + 1 or offsets[0] != 0 or offsets[-1] != len(X):
        raise InputError(f"'offsets' has {len(offsets)} entries from {offsets[0]} to {offsets[-1]} for "
                         f"{len(y)} bags and {len(X)} instances - give bags + 1, from 0 to the number "
                         "of instances")
    if not np.issubdtype(y.dtype, np.integer) or not 0 <= y.min() <= y.max() <= MOST_LABELS:
        raise InputError(f"'y' holds {y.dtype} from {min(y.tolist())} to {max(y.tolist())} - give "
                         "integers from 0")
    if groups is not None and groups.shape != y.shape:
        raise InputError(f"'groups' has shape {groups.shape} for {len(y)} bags - give one each")
    if folds is not None and (folds.ndim != 3 or folds.shape[2] != len(y) or folds.dtype != bool):
        raise InputError(f"'folds' has shape {folds.shape} and type {folds.dtype} for {len(y)} bags - "
                         "give (repeats, folds, bags) bool, True = train")
    return Bags(X, offsets, y, [], [str(i) for i in range(len(y))], folds, groups=groups)


def _read_bag(path, stream):
    """One bag's feature file: X (n, d), its coords or None, the path of its picture or None, and
    the group that all its instances belong to, or None."""
    arrays, streams = _Source(path), stream_names(path)
    name = stream or (streams[0] if len(streams) == 1 else None)
    if name not in streams:
        raise InputError(f"{path} has the streams {', '.join(streams) or 'none'} - pick one with "
                         "--stream")
    X = _instances(path, name, arrays)
    about = _about(arrays, len(X))
    images, groups = about.get("images"), np.unique(about.get("groups", []))
    if images is not None:                                   # pixels lie nowhere else
        images = os.path.join(os.path.dirname(path), images[0]) if images.ndim == 1 else None
    return X, arrays.get("coords"), images, groups[0] if len(groups) == 1 else None


def _instances(path, name, arrays):
    """The features (n, d) of a bag's instances; raises InputError for tokens."""
    X = _check_stream(path, name, arrays[name])
    if X.ndim != 2:
        raise InputError(f"{path}: '{name}' has shape {X.shape}, tokens of samples - a bag is "
                         "(instances, width): extract without --tokens")
    return X


def stratified_parts(y, shares, seed, groups=None):
    """Cut positions 0..n-1 into parts of these shares, every class in proportion: list of ascending arrays.

    The edges of the parts are rounded, so that a part's size in a class differs from its share by at most 1.
    With groups (n,), no group lies in two parts; then it is the groups that are in proportion, each
    counted as the rarest class among its samples, and the samples only as far as groups are alike.
    Where they are few, each part gets one of each class before any gets more than its share.
    """
    rng, parts = np.random.default_rng([seed, 9]), [[] for _ in shares]
    if groups is not None:
        member = np.unique(groups, return_inverse=True)[1]
        rarity = np.argsort(np.argsort(np.bincount(y), kind="stable"))      # 0: the rarest class
        kind = np.full(member.max() + 1, len(rarity))
        np.minimum.at(kind, member, rarity[y])
        for c in np.unique(kind):
            drawn, got = rng.permutation(np.flatnonzero(kind == c)), np.zeros(len(shares))
            for g in drawn:                                  # to what lacks most, else the smallest
                lack = np.array(shares) / sum(shares) * len(drawn) - got + (got == 0)
                i = np.lexsort(([len(part) for part in parts], -lack.round(9)))[0]
                got[i] += 1
                parts[i].append(g)
        return [np.flatnonzero(np.isin(member, part)) for part in parts]
    for c in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == c))
        ends = np.round(np.cumsum(shares) / sum(shares) * len(rows)).astype(int)
        for part, a, b in zip(parts, [0, *ends], ends):
            part.extend(rows[a:b])
    return [np.sort(np.array(part, int)) for part in parts]
