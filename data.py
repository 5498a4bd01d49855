"""Everything that enters: feature files, splits, batches, taxonomies, and a made-up world whose truth is known.

Read first   thesis A.1.1-A.1.2 (datasets, split, contiguous batches); for pictures, slides and bags 3.2.1-3.2.2 and 3.3.2.
Glossary     N samples . T tokens of a sample . d_s width of stream s . C labels . a stream is one model's features of the
             same N samples

A feature file is an .npz, or a folder of .npy files, with one floating array (N, d_s), or (N, T, d_s) for tokens, per
stream, its key (or file name) the stream's name; row i is the same sample everywhere. Reserved keys, all optional:
    labels (N,) whole numbers or text, below 0 or "" = unlabelled, or (N, C) bool, all False = none of these
    mask (N,) bool: False where the labels of a row are not known     label_names (C,)     split (N,) of train / val / test
    groups (N,) e.g. patients     ids, captions, images (N,)     coords
    grid (2,) int: rows and columns of the T tokens     boxes (n, 6): sample, label, x0, y0, x1, y1 in shares of the picture
Nothing is ever unpickled. A folder is memory-mapped: a batch reads its own rows and no others.

Deviations   from the authors' code: rows are never joined by position alone without checking that the counts agree;
             the short last block is shuffled among the others instead of always coming last.
"""
import functools
import gzip
import hashlib
import json
import math
import os
import re
import sys
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from xml.etree import ElementTree

import numpy as np
import scipy.ndimage
import scipy.sparse
import scipy.sparse.linalg
import torch
from PIL import Image, ImageDraw, ImageFilter

RESERVED = ("labels", "label_names", "ids", "groups", "split", "captions", "images", "coords", "grid", "mask", "boxes")
SPLITS = ("train", "val", "test")


class InputError(ValueError):
    """What the caller can mend: the message says what was wrong and, after a dash, what to do."""


@dataclass
class Features:
    """Streams of the same N samples and what is known about them.

    streams      dict stream -> (N, d_s) or (N, T, d_s) float array, in memory or memory-mapped, any float dtype
    split        (N,) of "train", "val", "test"
    labels       (N,) int, -1 = unlabelled, or (N, C) bool, or None        label_names  list of C names
    mask         (N,) bool, which rows of (N, C) labels are known; None: all
    parents      taxonomy: dict name -> name of its parent, None for the root; empty when there is none
    about        dict of the other per-sample arrays that the file gave: ids, groups, captions, images
    grid         (rows, columns) of the tokens, or None       boxes  (n, 6) as in the file, or None
    truth        made-up data only: dict stream -> (C, d_s), the direction of each concept, zeros where it is unseen
    order        dict stream -> (N,) rows: sample i of the stream is its row order[i]; how the null breaks the pairing
    notes        list of lines the user should see
    """
    streams: dict
    split: np.ndarray
    labels: np.ndarray = None
    label_names: list = field(default_factory=list)
    mask: np.ndarray = None
    parents: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)
    grid: tuple = None
    boxes: np.ndarray = None
    truth: dict = None
    order: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    hash: str = ""

    def __len__(self):
        return len(self.split)

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
        return replace(self, streams=flat, split=np.repeat(self.split, self.tokens), labels=None, label_names=[], mask=None,
                       parents={}, about={}, grid=None, boxes=None)

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
        """(len(rows), C) bool; a row without any True has none of the labels, or is not `known`. None without labels."""
        if self.labels is None:
            return None
        labels = np.asarray(self.labels[rows])
        return labels if labels.ndim == 2 else labels[:, None] == np.arange(len(self.label_names))

    def known(self, rows):
        """(len(rows),) bool: whose labels are known."""
        return known_labels(self.labels, self.mask)[rows]

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
    about = {k: arrays[k] for k in ("ids", "groups", "captions", "images") if k in arrays}
    for k, a in [*about.items(), *((k, arrays[k]) for k in ("labels", "mask", "split") if k in arrays)]:
        if not a.ndim or len(a) != n or a.ndim > 1 and k in ("ids", "groups", "captions", "split"):
            raise InputError(f"'{k}' has shape {a.shape} for {n} samples - give one for each row")
    labels, label_names, mask = _check_labels(arrays)
    parents = read_taxonomy(taxonomy, label_names) if taxonomy else {}
    out = Features(x, _split(arrays.get("split"), about.get("groups"), n, seed), labels, label_names, mask, parents, about,
                   _check_grid(arrays.get("grid"), tokens[names[0]]), _check_boxes(arrays.get("boxes"), n, label_names))
    _scan(out)
    if "split" in arrays and "groups" in about:
        seen = {g: set(out.split[about["groups"] == g]) for g in np.unique(about["groups"])}
        torn = [g for g, parts in seen.items() if len(parts) > 1]
        if torn:
            out.notes.append(f"{len(torn)} of {len(seen)} groups (first: {torn[0]}) lie in several splits")
    return out


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


def _check_stream(path, name, x, tokens=True):
    if not np.issubdtype(x.dtype, np.floating):
        raise InputError(f"stream '{name}' holds {x.dtype} - convert it to a float type "
                         f"(reserved keys: {', '.join(RESERVED)})")
    if x.ndim not in ((2, 3) if tokens else (2,)):
        raise InputError(f"stream '{name}' has shape {x.shape} - a stream is (samples, width)"
                         + (" or (samples, tokens, width)" if tokens else " in a bag: extract it without --tokens"))
    if 0 in x.shape:
        raise InputError(f"stream '{name}' has shape {x.shape} - it needs at least one row and one column")
    return x


MOST_LABELS = 10 ** 6


def _check_labels(arrays):
    """Labels of a file, (N,) int with -1 for unlabelled or (N, C) bool, their C names, and which rows of (N, C) are known
    (None: all); arrays: its arrays by key."""
    labels, names, mask = (arrays.get(key) for key in ("labels", "label_names", "mask"))
    if labels is None:
        return None, [], None
    if names is not None and names.ndim != 1:
        raise InputError(f"'label_names' has shape {names.shape} - give (C,) names")
    names = None if names is None else [str(v) for v in names]
    if mask is not None and (mask.shape != labels.shape[:1] or mask.dtype != bool):
        raise InputError(f"'mask' has shape {mask.shape} and type {mask.dtype} - give (N,) booleans, False = unlabelled")
    if labels.ndim == 2 and labels.shape[1] == 1 and labels.dtype != bool and (names is None or len(names) > 1):
        labels = labels[:, 0]                                # a column of classes, as MedMNIST has it
    if labels.ndim == 1 and labels.dtype.kind in "US":
        labels, names = _number_text(labels, names)
    whole = np.issubdtype(labels.dtype, np.integer)
    if labels.ndim == 1 and whole:
        count = int(labels.max()) + 1 if len(labels) else 0
        if count > MOST_LABELS:
            raise InputError(f"'labels' goes up to {count - 1} - number the classes from 0, at most {MOST_LABELS} of them")
        labels = np.where((labels >= 0) & (True if mask is None else mask), labels, -1).astype(np.int64)
        count, mask = max(count, 0), None
    elif labels.ndim == 2 and labels.shape[1] and (labels.dtype == bool or whole and len(labels)
                                                   and 0 <= labels.min() <= labels.max() <= 1):
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
    return labels, names, mask


def _number_text(labels, names):
    """Labels (N,) in words -> numbers in the order of `names`, or of the alphabet, -1 for an empty one; and the names."""
    text = [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in labels.tolist()]
    names = names or sorted({v for v in text if v})
    number = {"": -1, **{name: i for i, name in enumerate(names)}}
    unknown = next((row for row, v in enumerate(text) if v not in number), None)
    if unknown is not None:
        raise InputError(f"'labels' row {unknown} is '{text[unknown]}', which is not among 'label_names' - add it there")
    return np.array([number[v] for v in text], np.int64), names


def known_labels(labels, mask):
    """(N,) bool: which rows of labels, (N,) int or (N, C) bool with a mask, are known."""
    if labels.ndim == 1:
        return labels >= 0
    return np.ones(len(labels), bool) if mask is None else np.asarray(mask)


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
            bad = ~np.isfinite(block).all(1)
            if bad.any():
                row = start + int(bad.argmax())
                raise InputError(f"stream '{s}' has NaN or Inf in {bad.sum()} or more rows, first row {row} - "
                                 "drop or mend them")
            zeros += int((~block.any(1)).sum())
            digest.update(block)
        if zeros:
            features.notes.append(f"stream '{s}' has {zeros} all-zero rows: the loss skips them, "
                                  "retrieval counts them as missed")
    for a in (features.labels, features.mask, features.split, features.label_names, sorted(features.parents.items(), key=str)):
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
    out = Features(streams, _split(None, None, n, seed), labels, leaves, parents=parents, truth=truth)
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
    on the first right singular vectors of the rows `known`; what stands in none of these is not counted.
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
    axes = scipy.sparse.linalg.svds(counts[known], width, v0=np.ones(min(len(number), len(known))))[2][::-1]
    axes *= np.sign(axes[np.arange(width), np.abs(axes).argmax(1)])[:, None]                # so that they are always the same
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
    objects: a list of N lists of (name, (x0, y0, x1, y1) in shares of the picture), where they are annotated; about: other
    reserved keys of a feature file that came with the pictures."""
    paths: list
    labels: np.ndarray = None
    label_names: list = field(default_factory=list)
    split: np.ndarray = None
    boxes: np.ndarray = None
    mask: np.ndarray = None                                  # which rows of (N, C) labels are known; None: all
    objects: list = None
    about: dict = field(default_factory=dict)
    side: int = 224                                          # pixels that a part needs, at least, where a slide has levels

    def open(self, i):
        """Picture i in RGB."""
        return open_image(self.paths[i]) if self.boxes is None else _slide(self.paths[i]).read(self.boxes[i], self.side)

    def __len__(self):
        return len(self.paths)

    @property
    def whole(self):
        """Whether views must not cut anything off: tiles have no margin, and boxes are shares of the whole picture."""
        return self.boxes is not None or self.objects is not None or "boxes" in self.about

    def rows(self, *splits):
        return np.flatnonzero(np.isin(self.split, splits)) if splits else np.arange(len(self))

    def knn_rows(self, seed, most):
        """Pictures that vote and pictures that are judged: train against the other splits, else 80 / 20; some, if many."""
        rng, split = np.random.default_rng([seed, 8]), self.split
        if split is None:
            split = np.where(rng.random(len(self)) < 0.8, "train", "test")
        return [np.sort(rng.permutation(np.flatnonzero(part))[:most]) for part in (split == "train", split != "train")]

    @property
    def hash(self):
        """Changes with the files' names, their folders' and sizes, not with where all of it lies."""
        told = "\n".join(f"{os.path.join(*p.split(os.sep)[-2:])} {os.path.getsize(p)}" for p in self.paths)
        return hashlib.sha256(told.encode() + (b"" if self.boxes is None else self.boxes.tobytes())).hexdigest()[:16]


def read_images(path):
    """A folder of pictures, or of one level of class folders, optionally inside train, val and test folders; a single large
    picture, which is cut into tiles (`tile_slide`'s defaults); an .npz of tiles as the `tile` command writes it, or a
    folder of such; an .npz with `images` (N,) paths and other keys of a feature file, as `tissue` writes it; or a Pascal VOC
    folder, which brings its splits and its objects.

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
    paths, labels, names, split = _walk(path, PICTURES, "pictures")
    for p in paths:
        open_image(p, decode=False)
    return Images(paths, labels, names, split)


def _read_listed(path):
    """Pictures that an .npz names in `images` (N,), relative to itself, with what else it says of them."""
    arrays = read_arrays(path)
    if "images" not in arrays or not len(arrays["images"]):
        raise InputError(f"{path} lacks 'images', paths of pictures, or 'coords' of tiles - name another file")
    paths = [os.path.join(os.path.dirname(os.path.abspath(path)), str(p)) for p in arrays["images"]]
    for p in paths:
        open_image(p, decode=False)
    about = {k: v for k, v in arrays.items() if k in RESERVED and k != "images"}
    for k, v in about.items():
        if k not in ("boxes", "label_names", "grid") and (not v.ndim or len(v) != len(paths)):
            raise InputError(f"{path}: '{k}' has shape {v.shape} for {len(paths)} pictures - give one entry for each")
    labels, names, mask = _check_labels(about)
    return Images(paths, labels, names, about.get("split"), mask=mask, about=about)


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


def _walk(folder, endings, what):
    """Files of a folder laid out as `read_images` says: paths, labels (N,) or None, label names, split (N,) or None."""
    if not os.path.isdir(folder):
        raise InputError(f"no folder {folder} - name a folder of {what}, or of class folders of {what}")
    parts = {s: os.path.join(folder, s) for s in SPLITS if os.path.isdir(os.path.join(folder, s))} or {None: folder}
    found = []                                               # (path, class folder or "", split)
    for split, part in parts.items():
        for where, inside, files in os.walk(part):
            inside.sort()
            under = os.path.relpath(where, part)
            if os.sep in under:
                raise InputError(f"{where} lies deeper than one level of class folders - move its {what} up")
            found += [(os.path.join(where, f), "" if under == "." else under, split) for f in sorted(files)
                      if f.lower().endswith(endings)]
    if not found:
        raise InputError(f"no {what} in {folder} - expected {', '.join(endings)}")
    names = sorted({name for _, name, _ in found})
    labelled = names != [""]
    if labelled and "" in names:
        stray = next(path for path, name, _ in found if not name)
        raise InputError(f"{stray} lies beside class folders - move it into one, or remove the folders")
    return ([path for path, _, _ in found], np.array([names.index(name) for _, name, _ in found]) if labelled else None,
            names if labelled else [], np.array([split for _, _, split in found]) if None not in parts else None)


def open_image(path, decode=True):
    """A picture as RGB; without `decode` it is only looked at. Raises InputError naming the file."""
    try:
        image = Image.open(plain_file(path))
        return image.convert("RGB") if decode else image.close()
    except Image.DecompressionBombError:
        raise InputError(f"{path} is too large for one picture - cut it with `tile`, for which it needs openslide")
    except (OSError, SyntaxError, ValueError) as e:
        raise InputError(f"{path} is not a readable picture ({str(e) or type(e).__name__}) - remove or replace it")


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
    """Small pictures in memory: pixels (N, 3, S, S) uint8, labels (N,) int, label_names, split (N,) or None."""
    pixels: np.ndarray
    labels: np.ndarray
    label_names: list
    split: np.ndarray = None

    @property
    def hash(self):
        return _digest(self.pixels, self.labels)


def _digest(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


def read_pictures(path, size, label=None):
    """Labelled pictures at size x size: class folders, or an .npz that lists pictures, as `read_images` reads them; or a
    MedMNIST .npz with train_images, train_labels and so on for val and test. Where several labels hold at once, `label` is the
    name of the one to find. Raises InputError when there are no labels, or only one class."""
    if os.path.isdir(path) or "images" in _Source(path):
        images = read_images(path)
        if images.labels is None:
            raise InputError(f"{path} has no labels - put the pictures into folders named after them")
        labels, names, split = images.labels, images.label_names, images.split
        known = np.flatnonzero(known_labels(labels, images.mask))
        if labels.ndim == 1 and label:
            raise InputError(f"{path} has one label a picture - leave out --label")
        if labels.ndim == 2:
            if label not in names:
                raise InputError(f"{path}: no label '{label}' - name one with --label: {', '.join(names)}")
            labels, names = labels[:, names.index(label)].astype(int), [f"no {label}", label]
        views, labels, split = map(images.open, known), labels[known], split if split is None else split[known]
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
        views = (Image.fromarray(v).convert("RGB") for x in given.values() for v in x)
        names, split = [str(c) for c in range(labels.max() + 1)], np.repeat(there, [len(x) for x in given.values()])
    if len(np.unique(labels)) < 2:
        raise InputError(f"{path} has the one class {names[labels[0]]} - there is nothing to tell apart")
    pixels = np.stack([np.asarray(v.resize((size, size), Image.BICUBIC)).transpose(2, 0, 1) for v in views])
    return Pictures(pixels, labels, names, split)


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

    def __init__(self, path):
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
            self.image = open_image(path)
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
def _slide(path):
    return Slide(path)


def _forget_slides(worker):
    """A process that makes crops opens its slides itself: a file handle must not be shared."""
    _slide.cache_clear()


def slide_files(path):
    """A slide's path as a list, or the slides in a folder, class folders included. None is opened."""
    endings = (*PICTURES, ".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".bif")
    return _walk(path, endings, "slides")[0] if os.path.isdir(path) else [path]


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


def tile_slide(path, side=224, step=None, overview=2048, least=0.2, least_hole=0.2, **how):
    """Tiles of a slide's tissue: boxes (n, 4) as `tile_boxes` gives them, and a picture of the overview with both drawn in.

    side, step: in pixels of the slide. least, least_hole: areas in units of 512 x 512 such pixels, as in CLAM, which takes
    1 and 1 for biopsies, 100 and 16 for resections; ours is about a tile of 224. Raises InputError when there is no tissue.
    """
    slide = _slide(path)
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
    paths, boxes, labels, label_names = [], [], [], []
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
        known, label_names, _ = _check_labels(arrays)
        labels.append(known)
    labels = np.concatenate(labels) if all(v is not None for v in labels) else None
    return Images(paths, labels, label_names if labels is not None else [], boxes=np.concatenate(boxes))


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


def cut_boxes(folder, out, size=64, margin=0.2):
    """Cut the annotated boxes of a Pascal VOC folder into pictures out/<split>/<name>/<image>_<i>.png of `size` pixels.

    A cut is the square around a box's centre, as long as the box's longer side and `margin` more, so that shapes stay what
    they are, shifted inwards where it would reach over the image's edge. ImageSets/Main says what is train and what
    test. Boxes with a side of 8 pixels or less are left out. Returns dict (split, name) -> count.
    """
    count = {}
    for split, stem in voc_stems(folder):
        image = open_image(os.path.join(folder, "JPEGImages", f"{stem}.jpg"))
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
    split (bags,) or None; coords: list of (N_i, 4) boxes or None, images: list of paths or None: where instances were cut
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
    """An .npz with X (n, d), offsets (bags + 1,), y (bags,) and perhaps folds (R, F, bags), or a folder with a feature file
    for each bag, as `extract` writes them, in class folders, perhaps inside train, val and test folders.

    Raises InputError for shapes that do not fit, an empty bag, NaN, or a single class.
    """
    if os.path.isdir(path):
        paths, y, label_names, split = _walk(path, (".npz",), "feature files")
        if y is None:
            raise InputError(f"{path} has no class folders - put each bag's file into a folder named after its label")
        names, parts, coords, images = [os.path.splitext(os.path.basename(p))[0] for p in paths], [], [], []
        for p in paths:
            streams, arrays = stream_names(p), _Source(p)
            name = stream or (streams[0] if len(streams) == 1 else None)
            if name not in streams:
                raise InputError(f"{p} has the streams {', '.join(streams) or 'none'} - pick one with --stream")
            parts.append(_check_stream(p, name, arrays[name], tokens=False))
            coords.append(arrays.get("coords"))
            images.append(os.path.join(os.path.dirname(p), str(arrays["images"][0])) if "images" in arrays else None)
        widths = {x.shape[1] for x in parts}
        if len(widths) > 1:
            raise InputError(f"the bags in {path} have widths {sorted(widths)} - extract them with one backbone")
        X, offsets, folds = np.concatenate(parts), np.cumsum([0, *map(len, parts)]), None
    else:
        arrays, coords, images, split = _Source(path), None, None, None
        for key in ("X", "offsets", "y"):
            if key not in arrays:
                raise InputError(f"{path} lacks '{key}' - give X (instances, d), offsets (bags + 1,) and y (bags,)")
        X, offsets, y, folds = _check_stream(path, "X", arrays["X"], tokens=False), arrays["offsets"], arrays["y"], arrays.get("folds")
        label_names, names = [], [str(i) for i in range(len(y))]
        if y.ndim != 1 or offsets.ndim != 1 or not np.issubdtype(offsets.dtype, np.integer):
            raise InputError(f"'y' has shape {y.shape}, 'offsets' {offsets.shape} of {offsets.dtype} - give (bags,) and "
                             "(bags + 1,) integers")
        offsets = offsets.astype(np.int64)
        if len(offsets) != len(y) + 1 or offsets[0] != 0 or offsets[-1] != len(X):
            raise InputError(f"'offsets' has {len(offsets)} entries from {offsets[0]} to {offsets[-1]} for {len(y)} bags and "
                             f"{len(X)} instances - give bags + 1, from 0 to the number of instances")
        if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
            raise InputError(f"'y' holds {y.dtype} from {y.min()} - give integers from 0")
        if folds is not None and (folds.ndim != 3 or folds.shape[2] != len(y) or folds.dtype != bool):
            raise InputError(f"'folds' has shape {folds.shape} and type {folds.dtype} for {len(y)} bags - give (repeats, "
                             "folds, bags) bool, True = train")
    bad = np.flatnonzero(np.diff(offsets) < 1)
    if len(bad):
        raise InputError(f"bag {names[bad[0]]} is empty - drop it")
    rows = np.flatnonzero(~np.isfinite(X).all(1))
    if len(rows):
        raise InputError(f"instance {rows[0]} holds NaN or Inf - drop or mend it")
    if len(np.unique(y)) < 2:
        raise InputError(f"all bags have the label {y[0]} - there is nothing to learn")
    return Bags(X.astype(np.float32), np.asarray(offsets), y.astype(int), label_names or [str(c) for c in range(y.max() + 1)],
                names, folds, split, coords, images)


def stratified_parts(y, shares, seed):
    """Cut positions 0..n-1 into parts of these shares, every class in proportion: list of ascending arrays.

    The edges of the parts are rounded, so that a part's size in a class differs from its share by at most 1.
    """
    rng, parts = np.random.default_rng([seed, 9]), [[] for _ in shares]
    for c in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == c))
        ends = np.round(np.cumsum(shares) / sum(shares) * len(rows)).astype(int)
        for part, a, b in zip(parts, [0, *ends], ends):
            part.extend(rows[a:b])
    return [np.sort(np.array(part, int)) for part in parts]
