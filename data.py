"""Everything that enters: feature files, splits, batches, taxonomies, and a made-up world whose truth is known.

Read first   thesis A.1.1-A.1.2 (datasets, split, contiguous batches).
Glossary     N samples . d_s width of stream s . C labels . a stream is one model's features of the same N samples

A feature file is an .npz, or a folder of .npy files, with one floating array (N, d_s) per stream, its key (or file
name) the stream's name; row i is the same sample everywhere. Reserved keys, all optional:
    labels (N,) int, negative = unlabelled, or (N, C) bool     label_names (C,)     split (N,) of train / val / test
    groups (N,) e.g. patients     ids, captions, images (N,)     coords, grid, mask: for token streams
Nothing is ever unpickled. A folder is memory-mapped: a batch reads its own rows and no others.

Deviations   from the authors' code: rows are never joined by position alone without checking that the counts agree;
             the short last block is shuffled among the others instead of always coming last.
"""
import functools
import hashlib
import json
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageFilter

RESERVED = ("labels", "label_names", "ids", "groups", "split", "captions", "images", "coords", "grid", "mask")
SPLITS = ("train", "val", "test")


class InputError(ValueError):
    """What the caller can mend: the message says what was wrong and, after a dash, what to do."""


@dataclass
class Features:
    """Streams of the same N samples and what is known about them.

    streams      dict stream -> (N, d_s) float array, in memory or memory-mapped, any float dtype
    split        (N,) of "train", "val", "test"
    labels       (N,) int or (N, C) bool, or None           label_names  list of C names
    parents      taxonomy: dict name -> name of its parent, None for the root; empty when there is none
    about        dict of the other per-sample arrays that the file gave: ids, groups, captions, images
    truth        made-up data only: dict stream -> (C, d_s), the direction of each concept, zeros where it is unseen
    order        dict stream -> (N,) rows: sample i of the stream is its row order[i]; how the null breaks the pairing
    notes        list of lines the user should see
    """
    streams: dict
    split: np.ndarray
    labels: np.ndarray = None
    label_names: list = field(default_factory=list)
    parents: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)
    truth: dict = None
    order: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    hash: str = ""

    def __len__(self):
        return len(self.split)

    @property
    def dims(self):
        return {s: x.shape[1] for s, x in self.streams.items()}

    def rows(self, *splits):
        """Row numbers, ascending, of the first of `splits` that has any: rows("test", "val")."""
        for name in splits:
            rows = np.flatnonzero(self.split == name)
            if len(rows):
                return rows
        raise InputError(f"the {' and '.join(splits)} split is empty - give 'split' values or more samples")

    def batch(self, rows):
        """Raw features of `rows` (B,): dict stream -> (B, d_s) float32 tensor."""
        return {s: torch.from_numpy(np.asarray(x[self.order[s][rows] if s in self.order else rows], dtype=np.float32))
                for s, x in self.streams.items()}

    def label_matrix(self, rows):
        """(len(rows), C) bool; a row without any True is unlabelled. None when the file has no labels."""
        if self.labels is None:
            return None
        labels = np.asarray(self.labels[rows])
        return labels if labels.ndim == 2 else labels[:, None] == np.arange(len(self.label_names))

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
    about = {k: arrays[k] for k in ("ids", "groups", "captions", "images") if k in arrays}
    for k, a in [*about.items(), *((k, arrays[k]) for k in ("labels", "split") if k in arrays)]:
        if len(a) != n:
            raise InputError(f"'{k}' has {len(a)} entries for {n} samples - give one for each row")
    labels, label_names = _check_labels(arrays.get("labels"), arrays.get("label_names"))
    parents = read_taxonomy(taxonomy, label_names) if taxonomy else {}
    out = Features(x, _split(arrays.get("split"), about.get("groups"), n, seed), labels, label_names, parents, about)
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
    """The arrays of an .npz or of a folder of .npy, by key, read when asked for; a folder's are memory-mapped."""

    def __init__(self, path):
        self.path, self.npz = path, None
        if os.path.isdir(path):
            self.where = {f[:-4]: os.path.join(path, f) for f in sorted(os.listdir(path)) if f.endswith(".npy")}
            return
        self.npz = _load(path)
        if not isinstance(self.npz, np.lib.npyio.NpzFile):
            raise InputError(f"{path} holds one array without a name - save an .npz with one key per stream")
        self.where = dict.fromkeys(self.npz.files)

    def __contains__(self, key):
        return key in self.where

    def __getitem__(self, key):
        if self.npz is None:
            return _load(self.where[key], mmap_mode="r")
        return _load(f"{self.path}, key '{key}'", self.npz, key)

    def get(self, key):
        return self[key] if key in self else None


def _load(what, source=None, key=None, **kw):
    try:
        return source[key] if source is not None else np.load(what, allow_pickle=False, **kw)
    except FileNotFoundError:
        raise InputError(f"no file or folder {what} - check the path")
    except PermissionError:
        raise InputError(f"{what} may not be read - check its permissions")
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
        raise InputError(f"{what} is cut off or damaged - write it again")
    except ValueError as e:
        if "Object array" in str(e):
            raise InputError(f"{what} is an array of Python objects - save plain numbers or strings, "
                             "nothing is unpickled")
        raise InputError(f"{what} is not a readable .npz or .npy file - save features with numpy.savez")


def _check_stream(path, name, x):
    if not np.issubdtype(x.dtype, np.floating):
        raise InputError(f"stream '{name}' holds {x.dtype} - convert it to a float type "
                         f"(reserved keys: {', '.join(RESERVED)})")
    if x.ndim != 2:
        raise InputError(f"stream '{name}' has shape {x.shape} - a stream is (samples, width)")
    if 0 in x.shape:
        raise InputError(f"stream '{name}' has shape {x.shape} - it needs at least one row and one column")
    return x


def _check_labels(labels, names):
    """Labels as the file has them, (N,) int or (N, C) bool, and their C names."""
    if labels is None:
        return None, []
    names = None if names is None else [str(v) for v in names]
    if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        count = int(labels.max(initial=-1)) + 1
    elif labels.ndim == 2 and (labels.dtype == bool or np.issubdtype(labels.dtype, np.integer)
                               and 0 <= labels.min() <= labels.max() <= 1):
        count, labels = labels.shape[1], labels.astype(bool, copy=False)
    else:
        raise InputError(f"'labels' has shape {labels.shape} and type {labels.dtype} - "
                         "give (N,) integers or (N, C) booleans")
    if names is None:
        names = [f"label {i}" for i in range(count)]
    if len(names) < count or (labels.ndim == 2 and len(names) != count):
        raise InputError(f"'label_names' has {len(names)} names for {count} labels - give one each")
    return labels, names


def _split(given, groups, n, seed):
    """(N,) of train / val / test: as given; else 80 % of the groups, or of the samples, train, the rest val (A.1.2)."""
    if given is not None:
        split = np.array([v.decode() if isinstance(v, bytes) else str(v) for v in given.tolist()])
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
        step, zeros = max(1, block_bytes // (x.shape[1] * x.itemsize)), 0
        for start in range(0, len(x), step):
            block = np.ascontiguousarray(x[start:start + step])
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
    for a in (features.labels, features.split, features.label_names, sorted(features.parents.items(), key=str)):
        digest.update(repr(a).encode() if isinstance(a, list) else b"" if a is None
                      else np.ascontiguousarray(a).tobytes())
    features.hash = digest.hexdigest()[:16]


def read_taxonomy(path, label_names):
    """Read a taxonomy from JSON: {"child": "parent", ..., "root": null}, or nested {"LabelName", "Subcategory": [...]}
    as Open Images has it (a name that stands twice counts where it is deepest). Returns dict name -> parent or None.

    Raises InputError for a cycle, a parent that is no entry, several roots, or a label that is missing.
    """
    try:
        with open(path) as f:
            tree = json.load(f)
    except FileNotFoundError:
        raise InputError(f"no taxonomy at {path} - check the path")
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is not readable JSON ({e}) - "
                         "give {\"child\": \"parent\"} or nested LabelName/Subcategory")
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds a {type(tree).__name__} - "
                         "give {\"child\": \"parent\"} or nested LabelName/Subcategory")
    parents = {}
    if "LabelName" in tree:
        queue = [(tree, None)]                               # breadth first: what is seen last is deepest
        for node, parent in queue:
            parents[node["LabelName"]] = parent
            queue += [(child, node["LabelName"]) for child in node.get("Subcategory", [])]
    else:
        parents = {str(k): None if v is None else str(v) for k, v in tree.items()}
    roots = [k for k, v in parents.items() if v is None]
    for child, parent in parents.items():
        if parent is not None and parent not in parents:
            raise InputError(f"taxonomy: '{child}' has the unknown parent '{parent}' - "
                             "add it, with null as the root's parent")
        seen = {child}
        while parent is not None:
            if parent in seen:
                raise InputError(f"taxonomy: '{child}' is its own ancestor - break the cycle at '{parent}'")
            seen.add(parent)
            parent = parents[parent]
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
# Images, and DINO's crops of them (thesis 3.2.1; Caron et al. 2021, section 3)
# ---------------------------------------------------------------------------------------------------------------------

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # mean and standard deviation of R, G, B in 0..1
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
    """Image files and what their folders say: paths (list of N), labels (N,) int or None, label_names, split (N,) or
    None."""
    paths: list
    labels: np.ndarray = None
    label_names: list = field(default_factory=list)
    split: np.ndarray = None

    def __len__(self):
        return len(self.paths)

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
        """Changes with the files' names and sizes."""
        told = "\n".join(f"{p} {os.path.getsize(p)}" for p in self.paths)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def read_images(folder):
    """A folder of pictures, or of one level of class folders, optionally inside train, val and test folders.

    Every file is opened to see that it is a picture, and none is decoded. Raises InputError for a missing or empty
    folder, and for a file that cannot be read or is too large to be meant as one picture, by name.
    """
    if not os.path.isdir(folder):
        raise InputError(f"no folder {folder} - name a folder of pictures, or of class folders of pictures")
    parts = {s: os.path.join(folder, s) for s in SPLITS if os.path.isdir(os.path.join(folder, s))} or {None: folder}
    found = []                                               # (path, class folder or "", split)
    for split, part in parts.items():
        for where, inside, files in os.walk(part):
            inside.sort()
            under = os.path.relpath(where, part)
            if os.sep in under:
                raise InputError(f"{where} lies deeper than one level of class folders - move its pictures up")
            found += [(os.path.join(where, f), "" if under == "." else under, split) for f in sorted(files)
                      if f.lower().endswith(PICTURES)]
    if not found:
        raise InputError(f"no pictures in {folder} - expected {', '.join(PICTURES)}")
    for path, _, _ in found:
        open_image(path, decode=False)
    names = sorted({name for _, name, _ in found})
    labelled = names != [""]
    if labelled and "" in names:
        stray = next(path for path, name, _ in found if not name)
        raise InputError(f"{stray} lies beside class folders - move it into one, or remove the folders")
    return Images([path for path, _, _ in found],
                  np.array([names.index(name) for _, name, _ in found]) if labelled else None,
                  names if labelled else [],
                  np.array([split for _, _, split in found]) if None not in parts else None)


def open_image(path, decode=True):
    """A picture as RGB; without `decode` it is only looked at. Raises InputError naming the file."""
    try:
        image = Image.open(path)
        return image.convert("RGB") if decode else image.close()
    except Image.DecompressionBombError:
        raise InputError(f"{path} is too large for one picture - cut it into tiles first")
    except (OSError, SyntaxError, ValueError) as e:
        raise InputError(f"{path} is not a readable picture ({str(e) or type(e).__name__}) - remove or replace it")


def plain_view(size):
    """The transform for judging: shorter side to 8/7 of `size`, centre crop, normalised. Image -> (3, size, size)."""
    t = vision().transforms
    return t.Compose([t.Resize(round(size * 8 / 7), t.InterpolationMode.BICUBIC), t.CenterCrop(size), t.ToTensor(),
                      t.Normalize(*IMAGENET)])


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
            return self.crops(open_image(self.images.paths[i]))


def crop_batches(images, crops, batches, seed, first, last, workers=0):
    """Iterate over steps first .. last - 1: a list of V tensors (B, 3, h, w). batches: a `Batches` over the images."""
    steps = [[(step, int(i)) for i in batches.rows(step)] for step in range(first, last)]
    return iter(torch.utils.data.DataLoader(CropBatches(images, crops, seed), batch_sampler=steps, num_workers=workers,
                                            persistent_workers=False))


def write_npz(path, arrays):
    """Whole or not at all."""
    with open(f"{path}.tmp", "wb") as f:
        np.savez(f, **arrays)
    os.replace(f"{path}.tmp", path)
