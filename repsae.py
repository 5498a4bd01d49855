"""repsae: the command line, and the only module that knows the others.

    python repsae.py sparc                      SPARC on made-up streams whose truth is known
    python repsae.py sparc --data feats.npz     the same on features of your own (see data.py)
    python repsae.py sparc --help               every setting

Read first: FLAGS, where every flag is defined once; `Run`, the folder that a command owns while it
writes; `Coded`, a run's model with features and their codes; then cmd_sparc. A command is a recipe:
open the data, open the run, call one or two functions of the rooms, tell the page (eval.Page).

A run folder holds config.json, log.csv, checkpoint.pt, metrics.json and report.html, each written
whole or not at all. What a user can mend ends as one line on stderr and exit code 2. torch is
imported when it is first used, so that --help is quick.
"""
import argparse
import collections
import contextlib
import csv
import fcntl
import functools
import glob
import html
import importlib
import inspect
import io
import itertools
import math
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
import typing
import warnings


class Late:
    """A module that is imported when something of it is first used: --help needs no torch."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, what):
        return getattr(importlib.import_module(self._name), what)


data, judge, sae, ssm = Late("data"), Late("eval"), Late("sae"), Late("ssm")
np, sp, scipy, torch = Late("numpy"), Late("scipy.sparse"), Late("scipy"), Late("torch")
Image, ImageDraw = Late("PIL.Image"), Late("PIL.ImageDraw")
futures, multiprocessing = Late("concurrent.futures"), Late("multiprocessing")


class Number:
    """The kind of a numeric flag: `kind(text)`, finite, from `least` to `most`, or "auto"."""

    def __init__(self, kind, least, most, auto=False):
        self.kind, self.least, self.most, self.auto = kind, least, most, auto
        self.__name__ = "whole number" if kind is int else "number"

    def __call__(self, text):
        if self.auto and text == "auto":
            return text
        try:
            value = self.kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not self.least <= value <= self.most:             # NaN is in no range
            wanted = f"{self.__name__} from {self.least} to {self.most}"
            raise argparse.ArgumentTypeError(f"{text} - give a {wanted}")
        return value


def whole(least=0, most=10 ** 6, auto=False):
    """Whole numbers from `least` to `most`."""
    return Number(int, least, most, auto)


def real(least=0., most=1e6, auto=False):
    """Finite numbers from `least` to `most`; what must be positive starts at TINY."""
    return Number(float, least, most, auto)


TINY = 1e-12
SIDE = whole(1, 8192)
PART = real(0., 1.)

# ------------------------------------------------------------------------------------------------
# Every flag, once: name: (default, kind, help); a kind is a Number, str, bool or tuple of choices
# A command names those it takes, with its own default where it differs: "data lr=1e-3 images!".
# ------------------------------------------------------------------------------------------------

WHAT = {
    "data": (None, str, "features, an .npz or a folder of .npy (mil: bags); else a run's own, or "
             "made-up streams"),
    "streams": (None, str, "names of the streams to use, a,b,c; all by default"),
    "stream": (None, str, "the one stream to use, where there are several"),
    "taxonomy": (None, str, 'JSON, {"child": "parent", "root": null} or nested as in Open Images'),
    "images": (None, str, "pictures: a folder (of class, or of train, val, test folders), an .npz "
               "of MedMNIST's kind or of `tissue`; tile: a slide or a folder of them"),
    "weights": (None, str, "models a,b: name=RUN of dino or clip, name=FILE.pt of finetune, "
                "name=arch:FILE, name=arch:random, an arch alone; name=lsa:N reads captions by "
                "runs of N words; clip: a file of released weights"),
    "label": (None, str, "the label in question, by name or number"),
    "window": (None, str, "low,high: grey values shown black and white (--window=-1000,400)"),
    "mode": ("alone", ("alone", "joint"), "each stream chooses its latents, or all together"),
    "over": (None, str, 'the grid: "topk=global,local lam=0,1", streams=a+b,a+b+c'),
    "other": (None, str, "features of the same samples by another backbone, to set beside"),
    "sparc": (None, str, "a run of sparc on both streams, to set beside"),
    "split": ("random", ("random", "given"), "70 / 15 / 15 drawn anew each run, or the file's own"),
    "only": (None, str, "labels a,b to tell apart, or to find one by one; all by default"),
    "between": (None, str, "two labels a,b: which latents tell their groups apart?"),
    "query": (None, str, "words to search by"),
    "names": (None, str, 'JSON of names of latents, {"17": "round nucleus"}'),
    "prompts": (None, str, "file to write: samples of every latent, and a prompt for naming it"),
    "embeddings": (None, str, ".npz of a text model: latents (n,), vectors (n, e), query (e,)"),
    "head-file": (None, str, ".npz of a linear head, weight (d,), bias (); else one is fitted"),
    "sample": (0, whole(0, 10 ** 9), "number of the test sample that asks"),
    "from": (None, str, "its stream; the first by default"),
    "to": (None, str, "the stream to search; the last by default"),
    "features": (None, str, ".npy with a vector (d,) that asks, or a file whose row --sample asks"),
    "encoder": (None, str, "run of clip whose text encoder reads --query"),
    "latent": (None, str, "latents to show, 3,17; by default some of labels, alive everywhere"),
    "merges": (None, str, "CLIP's merges file; else words of the captions are the tokens"),
    "voc": (None, str, "Pascal VOC folder, whose boxes become the pictures"),
    "rois": (None, str, "ASAP annotations (XML): label the tiles by them"),
    "pictures": (4000, whole(8), "how many to draw"),
    "most": (12, whole(1), "pictures at most"),
    "least": (50, whole(), "training samples of a label a latent needs to be one of its own"),
    "top": (10, whole(1), "samples that show what a latent is, or that a search finds"),
    "seeds": (1, whole(1, 1000), "how often, from --seed on, for means and deviations"),
    "runs": (5, whole(1, 1000), "seeds"),
    "quick": (False, bool, "a size at which only the mechanics count, in minutes"),
}
MODEL = {
    "preset": (None, ("thesis", "mammo", "cyto"), "sparc: the thesis's settings, for a million "
               "samples (5.3.2, A.1.2); sae: thesis 4.1, Mammo-SAE, CytoSAE; typed flags go first"),
    "latents": ("auto", whole(1, 2 ** 24, auto=True), "L, width of the code; auto: by the rows"),
    "k": ("auto", whole(1, auto=True), "latents kept per sample; auto: an eighth of L, 40 to 64"),
    "topk": ("global", ("global", "local", "both", "random"), "who chooses them in training: all "
             "streams together, each for itself, both with the losses added (ours), or one stream "
             "drawn each step (Universal SAE)"),
    "lam": (1., real(), "weight of cross reconstruction (thesis Eq. 14)"),
    "loss": ("sum", ("sum", "mean"), "over streams: Eq. 14, or the authors' code, where "
             "lam_paper = lam_code / (M - 1)"),
    "targets": ("auto", whole(1, auto=True), "other streams that each code rebuilds in a step, "
                "drawn anew; auto: all up to 4 streams, then 2"),
    "norm": ("auto", ("auto", "l2", "standard", "standard,l2", "none"), "length 1 per sample, mean "
             "0 and deviation 1 per dimension, or both in that order (auto)"),
    "dead-after": ("auto", whole(1, 10 ** 9, auto=True), "steps without firing that make a latent "
                   "dead; auto: 1000, or a quarter of all"),
    "activation": ("topk", str, "topk, relu with an L1 penalty, batchtopk, "
                   "jumprelu with an L0 penalty, or all: every kind, in one table"),
    "sparsity": (None, real(), "lambda of L1 (relu: 0.1) or L0 (jumprelu: 0.01), for length 1"),
    "error": (None, ("nmse", "sum", "mean"), "squared error over ||x||^2, summed over d as papers "
              "write, or its mean: lambda_paper = d * lambda_code"),
    "revive": (None, ("none", "auxk", "ghost", "resample"), "what is done about dead latents"),
    "bias": ("zeros", ("zeros", "mean", "median"), "start of the decoder's bias"),
    "null": ("auto", bool, "once more with rows of all streams but the first shuffled; auto: where "
             "that takes under about a minute"),
    "arch": ("vim_small", str, "backbone: a preset of ssm.py"),
    "patch": (None, whole(1, 2048), "patch size, where not the preset's"),
    "size": (None, whole(1, 8192), "side of pictures or of DINO's global crops, pixels"),
    "width": (96, whole(1, 10 ** 5), "of both of CLIP's transformers"),
    "prototypes": (65536, whole(2), "K, outputs of DINO's head"),
    "head-hidden": (2048, whole(1, 10 ** 5), "width of DINO's head"),
    "head": ("gated", str, "of a bag: max, mean, abmil, gated, clam_sb, clam_mb; several: a,b"),
    "widths": ("512", str, "of the layers that embed an instance, a,b"),
    "attention": (256, whole(1, 10 ** 5), "hidden width of the attention"),
    "instances": (8, whole(1), "CLAM: instances called positive, and as many negative"),
    "dropout": (0.25, real(0., .99), "after the embedding; CLAM: in the attention too"),
    "frozen": (False, bool, "train the head alone"),
    "standardise": (False, bool, "random weights start in the pictures' own units (ours)"),
    "last": (4, whole(1, 1000), "ViT: class tokens of so many last blocks side by side"),
    "tokens": (False, bool, "patch tokens (N, T, d), in half precision, not the class token"),
    "whole": (False, bool, "squeeze pictures to a square instead of cutting their middle out"),
    "tau": (0., real(), "activation above which a patch counts (CytoSAE Eq. 3; barcodes: 0.2)"),
    "weighted": (False, bool, "entropy weighted by activation, as CytoSAE's code has it"),
    "rank": ("mean", ("mean", "difference", "boxes"), "latents of a label: by mean activation "
             "(Mammo-SAE), by the difference to the rest or inside its boxes (ours)"),
    "iou": (0.25, real(1e-9, 1.), "overlap with a true box that makes a box right"),
    "solver": ("lbfgs", ("lbfgs", "sgd"), "of the linear probe: exact, or DINO's 20 epochs"),
    "downsample": (1., real(1e-9), "pixels of the slide in one of the tile's"),
    "threshold": (8, whole(0, 255), "saturation above which a pixel is tissue"),
    "otsu": (False, bool, "find that threshold by Otsu's method"),
    "smallest": (0.2, real(), "smallest piece of tissue, in areas of 512 x 512 pixels"),
}
TRAINING = {
    "epochs": ("auto", whole(1, auto=True), "passes at most; auto: 50, or what makes 1,000 steps"),
    "batch": ("auto", whole(1, auto=True), "samples a step; auto: a tenth of the rows, up to 256"),
    "lr": ("auto", real(TINY, 1e30, auto=True), "learning rate (auto: 2e-4 sqrt(2^14 / L)); dino: "
           "at batch 256"),
    "warmup": (0, whole(), "steps over which the learning rate rises; dino: epochs"),
    "weight-decay": (0., real(), "L2 penalty, or AdamW's decay; dino: at the start"),
    "shuffle": ("auto", ("auto", "blocks", "samples"), "single samples, or blocks of a batch's "
                "size (auto: for memory-mapped folders)"),
    "patience": (20, whole(1), "epochs without a better validation loss that end training"),
    "min-epochs": (50, whole(), "epochs that are trained in any case"),
    "momentum": (0.996, PART, "of DINO's teacher at the start; 1 at the end"),
    "local-size": (96, SIDE, "side of DINO's local crops"),
    "local-crops": (8, whole(0, 100), "their number"),
    "local-scale": ("0.05,0.4", str, "share of the area that they cover, from,to"),
    "global-scale": ("0.4,1", str, "the same of global crops"),
    "blur": (2., real(0., 100.), "largest radius of the blur, pixels; less for small pictures"),
    "colour": (1., real(0., 2.), "strength of colour changes; less where colour matters"),
    "pathology": (False, bool, "vertical flips, right-angle turns, stain jitter too (ours)"),
    "balanced": (False, bool, "draw bags so that classes are equally frequent"),
    "folds": (0, whole(0, 1000), "parts of all bags, reported in turn; 0: the file's, or 70/15/15"),
    "votes": (1, whole(1, 1000), "models that vote on a bag, each from its own weights"),
    "seed": (42, whole(0, 2 ** 32 - 1), "of everything drawn: split, weights, order, pictures"),
}
RUN = {
    "out": (None, str, "where to write; a folder inside the run by default"),
    "json": (None, str, "file for every figure"),
    "svg": (None, str, "file for the picture that `bench backbones` draws"),
    "device": ("cpu", str, "torch device"),
    "workers": (2, whole(0, 256), "processes that make crops"),
    "eval-rows": (10000, whole(0, 10 ** 9), "samples judged, of the test (else val) split; 0: all"),
    "log-every": (20, whole(1), "steps between rows of log.csv"),
    "save-every": (60., real(), "seconds between checkpoints"),
    "overwrite": (False, bool, "replace what an earlier run wrote there, and nothing else"),
    "resume": (False, bool, "go on where the run there stopped, or start it"),
    "set": (None, str, 'settings of a reproduction, "name=value name=value": see below'),
}
# Constants of the papers, which --set alone reaches.
SETTINGS = {
    "aux-k": (64, whole(), "dead latents that rebuild the residual (AuxK); 0 for none"),
    "aux-coef": (1 / 32, real(), "weight of AuxK"),
    "reinit-after": (1000, whole(-1, 10 ** 9), "steps more until a dead latent is drawn anew; -1: "
                     "never (the authors' 0 leaves AuxK nothing to do)"),
    "select": ("fp32", ("fp32", "bf16"), "precision of choosing latents; bf16 halves its time"),
    "kernels": ("auto", ("auto", "csr", "gather"), "of sparse products; auto: csr on a CPU"),
    "expansion": (None, whole(1), "L over the stream's width, instead of --latents"),
    "bandwidth": (0.1, real(TINY), "jumprelu: epsilon of the threshold's gradient"),
    "theta": (0.1, real(TINY), "jumprelu: the thresholds at the start"),
    "bottleneck": (256, whole(1, 10 ** 5), "DINO's head: width of its last layer"),
    "norm-last": (True, bool, "DINO: prototypes keep unit length"),
    "teacher-temp": (0.04, real(1e-6), "DINO: of the teacher"),
    "teacher-temp-start": (0.04, real(1e-6), "DINO: the same in the first epoch"),
    "teacher-warmup": (0, whole(), "DINO: epochs from the one to the other"),
    "min-lr": (1e-6, real(), "DINO: learning rate at the end"),
    "weight-decay-end": (0.4, real(), "DINO: weight decay at the end"),
    "decay-ssm": (False, bool, "DINO: decay state-space parameters too, as the authors' run did"),
    "clip": (3., real(1e-9), "DINO: largest gradient norm of each parameter"),
    "freeze-last": (1, whole(), "DINO: epochs in which prototypes stay fixed"),
    "drop-path": (0.1, real(0., .99), "DINO: stochastic depth of the student"),
    "knn-every": (1, whole(1), "DINO: epochs between k-NN evaluations"),
    "layers": (4, whole(1, 1000), "CLIP: of both transformers"),
    "joint": (64, whole(1, 10 ** 5), "CLIP: width of the common space"),
    "context": (32, whole(3, 10 ** 4), "CLIP: longest text, tokens"),
    "squash": (0, whole(0, 1), "MIL: 1 for tanh of the standardised features, against outliers"),
    "bag-weight": (0.7, PART, "CLAM: weight of the bag's loss; the rest is the instances'"),
    "inst-loss": ("svm", ("svm", "ce"), "CLAM: smooth top-1 SVM or cross-entropy of instances"),
    "subtyping": (False, bool, "CLAM: classes exclude each other"),
    "cosine": (False, bool, "MIL: the learning rate falls to 0 along half a cosine"),
    "percentile": (95., real(0., 100.), "of a heat map: what is at or above it is hot"),
    "connectivity": ("8", ("8", "4"), "hot pixels that touch at corners are one box, or not"),
    "strict": (False, bool, "hot: above the percentile, not at it"),
    "box-score": ("box", ("box", "hot"), "of a box: mean activation in it, or of hot pixels"),
    "ap-points": (0, whole(0, 10 ** 5), "recalls at which precision is averaged; 0: all"),
    "start-layer": (0, whole(-1000, 1000), "first layer of relevancy maps; -1 for the last alone"),
    "strength": (1., real(TINY), "probe: C of lbfgs, larger is less regular"),
    "step": (None, whole(1), "pixels from tile to tile; the size by default"),
    "least-hole": (0.2, real(), "smallest hole in tissue, in areas of 512 x 512 pixels"),
    "max-holes": (8, whole(), "holes of a piece of tissue that count"),
    "roi-share": (0.5, real(1e-9, 1.), "share of a tile inside the regions that makes it theirs"),
    "margin": (0.2, real(0., 100.), "how much longer than a box's longer side its cut is"),
}
GROUPS = {"what": WHAT, "model": MODEL, "training": TRAINING, "run": RUN}
FLAGS = {name: row for table in (*GROUPS.values(), SETTINGS) for name, row in table.items()}
COMMANDS = {}


class Command(typing.NamedTuple):
    """A sub-command: its function, {flag: default}, the flags it needs, positional arguments."""
    run: typing.Callable
    flags: dict
    needed: frozenset
    positional: tuple


def command(spec, *positional):
    """Enter cmd_NAME in COMMANDS. spec: names of flags, `name=default`, or `name!` if needed."""
    def enter(run):
        defaults, needed = {}, set()
        for word in spec.split():
            name, equals, text = word.rstrip("!").partition("=")
            default, kind, _ = FLAGS[name]
            defaults[name] = value_of(kind, text) if equals else default
            if word.endswith("!"):
                needed.add(name)
        COMMANDS[run.__name__[4:]] = Command(run, defaults, frozenset(needed), positional)
        return run
    return enter


DATA = "data streams taxonomy"
SHARED = "topk lam loss targets"
CODE = "latents k norm dead-after aux-k aux-coef reinit-after select kernels"
KINDS = "sparsity error bias expansion bandwidth theta warmup"
STEPS = "epochs batch lr shuffle seed"
FOLDER = "device log-every save-every eval-rows overwrite resume"
ON_RUN = "data seed device out overwrite"


def kind_of(name, default):
    """The kind of a flag where this is its default: "auto" is taken where it is the default."""
    kind = FLAGS[name][1]
    if isinstance(kind, Number) and default != "auto":
        return Number(kind.kind, kind.least, kind.most)
    return kind


def value_of(kind, text):
    """The value that a flag's kind reads from text; raises ArgumentTypeError."""
    if kind is bool:
        kind = ("no", "yes", "0", "1", "False", "True")
    if isinstance(kind, tuple):
        if text not in kind:
            raise argparse.ArgumentTypeError(f"{text} - take one of {', '.join(kind)}")
        return text in ("yes", "1", "True") if kind[0] == "no" else text
    return kind(text)

THESIS = {"latents": 8192, "k": 64, "batch": 256, "lr": 1e-4, "epochs": 50, "norm": "l2",
          "shuffle": "blocks", "dead_after": 1000}           # of SPARC: 5.3.2, A.1.2
PRESETS = {                                                  # of one stream
    "thesis": {"activation": "relu", "error": "sum", "norm": "none", "revive": "none"},
    "mammo": {"activation": "relu", "error": "mean", "sparsity": 3e-5, "norm": "none",
              "revive": "resample", "expansion": 8, "lr": 3e-4, "batch": 4096, "epochs": 200},
    # 64 images of 257 tokens a step; 10^6 of 41,906 images seen
    "cyto": {"activation": "relu", "error": "mean", "sparsity": 8e-5, "norm": "none",
             "revive": "ghost", "bias": "median", "expansion": 64, "lr": 4e-4, "warmup": 500,
             "batch": 16448, "epochs": 24, "dead_after": 64},
}
# What rows cannot tell of the made-up streams: they have 48 concepts, three or four in a sample.
PLANTED = {"latents": 128, "k": 6, "norm": "l2"}
PLANTED_SAE = {"topk": {}, "relu": {}, "batchtopk": {"k": 3},
               "jumprelu": {"sparsity": 0.1, "bandwidth": 0.3}}


class InputError(ValueError):
    """What the caller can mend. Each room raises its own; `main` knows them by name."""


# ------------------------------------------------------------------------------------------------
# Runs: folders that a command owns while it writes
# ------------------------------------------------------------------------------------------------

FREE_ON_RESUME = {"out", "resume", "overwrite", "save_every", "device", "null"}


class Run:
    """A folder that one command writes to.

    flags    the settings: those typed or, on --resume, those that the run there was started with
    saved    its config.json where it goes on, else None

    config.json lists what a run wrote. Nothing else is ever replaced or removed, no link is
    followed, and no second process gets in: its lock ends with the process, whatever ends that.
    """

    held = []                                                # (lock file, its path) of this process

    def __init__(self, flags, folder=None, resume=None, add=False):
        """`folder`: instead of --out; `resume`: instead of --resume; `add`: files of an earlier run
        of this command stay, but for those written anew. Changes nothing there yet."""
        self.folder = flags.out if folder is None else folder
        self.flags, self.saved, self.files, self.about = flags, None, [], {}
        self.kept = []                                       # files of the run that is added to
        resume = flags.get("resume") if resume is None else resume
        if resume and not os.path.exists(self.join("config.json")):
            check_needed(flags)
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise InputError(f"{self.folder} is a file - name a folder with --out")
        if not os.path.isdir(self.folder) or not set(os.listdir(self.folder)) - {".lock"}:
            return
        if os.path.realpath(self.folder) in inputs_of(flags):
            raise InputError(f"{self.folder} is read by this command - name another --out")
        self._lock()
        config = {}
        if os.path.lexists(self.join("config.json")):
            config = read_config(self.folder)
            self.files = self._listed(config)
        if add and config.get("command") == flags.command:
            self.kept = self.files
        elif not resume and not flags.get("overwrite"):
            raise InputError(f"{self.folder} holds files already - use --overwrite" +
                             ", --resume" * ("resume" in flags) + " or another --out")
        if config and resume:
            self._go_on(config)

    def join(self, *parts):
        return os.path.join(self.folder, *parts)

    def _listed(self, config):
        files = config.get("files")
        if files is None:                                    # written before runs listed them
            files = [name for name in WRITTEN if os.path.isfile(self.join(name))]
        if not isinstance(files, list) or not all(isinstance(f, str) and plain(f) for f in files):
            raise InputError(f"{self.join('config.json')} is damaged - restore it, or remove it")
        return files

    def _go_on(self, config):
        """Take the settings that the run was started with; those typed now must be the same."""
        theirs, flags, path = config["flags"], self.flags, self.join("config.json")
        if theirs.get("command", flags.command) != flags.command:
            raise InputError(f"{self.folder} holds a run of {theirs['command']} - resume it with "
                             "that command")
        check_kinds(theirs, COMMANDS[flags.command].flags, path)
        for name in sorted(flags.given - FREE_ON_RESUME):
            if flags[name] not in (theirs.get(name), "auto"):
                raise InputError(
                    f"--{name.replace('_', '-')} {flags[name]} differs from the run in "
                    f"{self.folder}, which has {theirs.get(name)} - resume without it, or train "
                    "anew with --overwrite")
        typed = FREE_ON_RESUME & flags.given | {"out", "resume", "overwrite"}
        self.flags = flags.replaced({k: v for k, v in theirs.items() if k not in typed})
        given = config.get("given", [])
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise InputError(f"{path} has {given!r} as what was given - restore it, or train anew")
        self.flags.given |= frozenset(given)
        self.saved = config
        threads = config.get("versions", {}).get("threads")
        if threads not in (None, torch.get_num_threads()):
            say_once(f"note: the run had {threads} threads, now {torch.get_num_threads()}: sums "
                     "may differ in their last digits")

    def _lock(self):
        path = self.join(".lock")
        try:
            lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"process {lock.read(20).strip()} is writing to {self.folder} - wait "
                             "for it, or name another --out")
        except OSError as e:
            raise InputError(f"cannot write to {self.folder} ({e.strerror}) - name another --out")
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self.held.append((lock, path))

    @classmethod
    def release(cls):
        """Give up the locks of this process: at the end of every command."""
        while cls.held:
            lock, path = cls.held.pop()
            with contextlib.suppress(OSError):               # somebody removed the folder
                os.unlink(path)
            lock.close()

    def begin(self, flags=None, **about):
        """Make the folder, rid it of what its manifest lists unless the run goes on, and write
        config.json: the resolved `flags` and what `about` tells."""
        self.flags = self.flags if flags is None else flags
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as e:
            raise InputError(f"cannot write to {self.folder} ({e.strerror}) - name another --out")
        if self.join(".lock") not in [path for _, path in self.held]:
            self._lock()
        if not self.saved and not self.kept:
            inputs = inputs_of(self.flags)
            for name in self.files:
                path = self.join(name)
                if os.path.realpath(path) in inputs:
                    raise InputError(f"{path} is read by this command - name another --out")
                leftovers = glob.glob(glob.escape(path) + ".*.tmp")      # of a run that was killed
                for left in [path, *leftovers] if inside(path, self.folder) else ():
                    if os.path.isfile(left) and not os.path.islink(left):
                        os.remove(left)
            self.files = []
        self.about = {"command": self.flags.command, "flags": self.flags, **about,
                      "given": sorted(self.flags.given - FREE_ON_RESUME), "versions": versions()}
        self._claim("config.json", new=True)
        return self

    def trained_on(self, data_hash, name):
        """Raise InputError when the run goes on, but was started on other data."""
        if self.saved and self.saved.get("data_hash") != data_hash:
            raise InputError(f"{name} is not what the run in {self.folder} was trained on - "
                             "restore it, or train anew")

    def path(self, *parts):
        """The path of an output, in the manifest before it is written."""
        return self._claim("/".join(parts))

    def paths(self, names):
        """`path` of many at once."""
        return self._claim(*names)

    def _claim(self, *names, new=False):
        for name in names:
            path = self.join(name)
            if not plain(name):
                raise InputError(f"{name!r} cannot be the name of a file - rename it")
            if name not in self.files and name != "config.json" and os.path.lexists(path) \
                    or os.path.islink(path) or not inside(path, self.folder):
                raise InputError(f"{path} was not written by this run - move it away, or name "
                                 "another --out")
            if name in self.kept and name != "config.json" and not self.flags.overwrite:
                raise InputError(f"{path} exists - use --overwrite, or another --out")
            os.makedirs(os.path.dirname(path), exist_ok=True)
        listed = [*dict.fromkeys([*self.files, *names])]
        if new or len(listed) > len(self.files):
            self.files = listed
            judge.write_json(self.join("config.json"), {**self.about, "files": self.files})
        return self.join(names[0]) if len(names) == 1 else [self.join(name) for name in names]

    def part(self, name, flags):
        """A run within this one. It goes on only if it was started with these very flags: another
        run, overwritten since, may have left a folder of that name."""
        folder, resume = self.join(name), False
        if os.path.islink(folder) or not plain(name):
            raise InputError(f"{folder} was not made by this run - move it away, or name another "
                             "--out")
        if self.saved and os.path.exists(os.path.join(folder, "config.json")):
            theirs = read_config(folder)["flags"]
            resume = all(theirs.get(k) == v for k, v in flags.items() if k not in FREE_ON_RESUME)
        return Run(flags.replaced({"overwrite": True}), folder, resume)


def plain(name):
    """Whether a relative path with / stays where it is: no .., no empty or hidden part."""
    return all(part and part[0] != "." and "\\" not in part and "\0" not in part
               for part in name.split("/"))


def inside(path, folder):
    """Whether a path is in a folder when links are followed."""
    folder = os.path.realpath(folder)
    return os.path.commonpath([folder, os.path.realpath(os.path.dirname(path))]) == folder


# Flags that name what a command reads.
INPUTS = ("data", "images", "weights", "taxonomy", "other", "sparc", "names", "embeddings",
          "head_file", "features", "encoder", "merges", "voc", "rois", "run")
WRITTEN = ("config.json", "log.csv", "checkpoint.pt", "metrics.json", "report.html")


def inputs_of(flags):
    """The real paths of what exists of all that the flags name to be read."""
    named = [piece for k in INPUTS if isinstance(flags.get(k), str)
             for piece in {flags[k], *re.split("[,=:]", flags[k])}]
    return {os.path.realpath(p) for p in named if p and os.path.exists(p)}


def is_read(path, flags):
    """Whether a file is read by the command itself: named, in a folder of data, or of a run."""
    path = os.path.realpath(path)
    for given in inputs_of(flags):
        name = os.path.relpath(path, given)
        if path == given:
            return True
        if not name.startswith("..") and os.path.isdir(given):
            own = os.path.join(given, "config.json")
            if not os.path.exists(own) or name in read_config(given).get("files", WRITTEN):
                return True
    return False


def out_file(flags, name="out"):
    """The path in flags[name], once it is clear that a file may be written there: no file of the
    user's without --overwrite, no link, no input of this very command ever."""
    path = flags[name]
    if not os.path.lexists(path):
        return path
    if is_read(path, flags):
        raise InputError(f"{path} is read by this command - name another --{name}")
    if os.path.islink(path) or not os.path.isfile(path):
        raise InputError(f"{path} is no plain file - name another --{name}")
    if not flags.overwrite:
        raise InputError(f"{path} exists - use --overwrite, or another --{name}")
    return path


def read_config(folder, names=()):
    """config.json of a run folder, a dict, whose "flags" have those of `names`, of their kinds."""
    path = os.path.join(folder, "config.json")
    config = data.read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("flags"), dict):
        raise InputError(f"{path} is no config of a run - restore it, or train anew elsewhere")
    check_kinds(config["flags"], {name: FLAGS[name][0] for name in names}, path)
    return config


def check_kinds(values, defaults, path):
    """Raise InputError unless what the file `path` holds could be typed for these flags."""
    for name, default in defaults.items():
        value, kind = values.get(name.replace("-", "_"), default), kind_of(name, default)
        if type(value) is type(default) and value == default:
            continue
        try:
            fits = isinstance(value, kind) if kind in (bool, str) else \
                isinstance(value, (int, float, str)) and value_of(kind, str(value)) == value
        except (ValueError, OverflowError, argparse.ArgumentTypeError):
            fits = False
        if not fits:
            raise InputError(f"{path} has {value!r} as {name} - restore it, or train anew")


@contextlib.contextmanager
def unpacked(path, wrong, advice, device="cpu"):
    """What a .pt file holds, for lines that take it apart: what fails there is one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # torch's own, of TorchScript
            state = torch.load(data.plain_file(path), weights_only=True, map_location=device)
        yield state
    except Exception as e:                                   # torch raises many kinds here
        if type(e).__name__ == "InputError":
            raise
        raise InputError(f"{path} {wrong} ({type(e).__name__}) - {advice}")


def versions():
    """What a run depends on besides its flags: a dict for config.json."""
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "scipy": scipy.__version__, "threads": torch.get_num_threads()}


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

class Progress:
    """A line on stderr that rewrites itself on a terminal; elsewhere one every tenth of the way."""

    def __init__(self, total, start=0):
        self.total, self.began, self.first = total, time.time(), start
        self.live = sys.stderr.isatty()
        self.next = start + (10 if self.live else max(1, total // 10))

    def __call__(self, step, text):
        if step < self.next and step < self.total:
            return
        self.next = step + (1 if self.live else max(1, self.total // 10))
        left = (time.time() - self.began) / max(step - self.first, 1) * (self.total - step)
        line = f"step {step}/{self.total}  {text()}  {left:.0f} s left"
        stays = step >= self.total or not self.live
        print(f"\r{line:<100}" if self.live else line, end="\n" * stays, file=sys.stderr,
              flush=True)


class Log:
    """The rows of log.csv: text, so that a resumed run keeps them to the byte.

    Those up to step `upto` are read; they need the `columns` that are drawn, and may be empty in
    `gaps` alone.
    """

    def __init__(self, path, upto=0, columns=(), gaps=()):
        self.path, self.rows = path, []
        if not upto or not os.path.exists(path):
            return
        data.plain_file(path)
        try:
            with open(path, newline="") as f:
                self.rows = [row for row in csv.DictReader(f) if int(row["step"]) <= upto]
            whole = all(math.isfinite(float(v)) for row in self.rows for k, v in row.items()
                        if k != "revive" and (v or k not in gaps))
            whole = whole and all(row.keys() >= {*columns} for row in self.rows[:1])
        except (KeyError, TypeError, ValueError, csv.Error):
            whole = False
        if not whole:
            raise InputError(f"{path} is damaged - restore it, or remove it and lose the curves")

    def add(self, row):
        if self.rows and self.rows[0].keys() != row.keys():
            raise InputError(f"{self.path} has other columns than this run - restore or remove it")
        self.rows.append({k: str(v) for k, v in row.items()})

    def write(self):
        text = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        judge.write_text(self.path, text.getvalue())


class Interrupted(Exception):
    """Training was asked to stop, and has saved."""


class Keeper:
    """Logs, shows progress, saves by save(), and obeys signals between two steps, never inside."""

    def __init__(self, flags, n_steps, start, log, save):
        self.flags, self.n_steps, self.log, self.save = flags, n_steps, log, save
        self.progress, self.last_save, self.stop = Progress(n_steps, start), time.time(), []

    def __enter__(self):
        obeyed = signal.SIGINT, signal.SIGTERM
        if threading.current_thread() is not threading.main_thread():
            obeyed = ()                                      # Python allows handlers there alone
        self.before = {n: signal.signal(n, self.on_signal) for n in obeyed}
        return self

    def __exit__(self, *_):
        for n, handler in self.before.items():
            signal.signal(n, handler)

    def on_signal(self, number, frame):
        if self.stop:
            raise KeyboardInterrupt                          # the second time at once, unsaved
        self.stop.append(number)

    def __call__(self, step, row, text, log=False):
        """After each step. row() gives the row of log.csv, text() the words of progress."""
        last = step == self.n_steps
        if log or step % self.flags.log_every == 0 or last:
            self.log.add({"step": step, **row()})
        self.progress(step, text)
        if self.stop or last or time.time() - self.last_save >= self.flags.save_every:
            self.log.write()                                 # first: resuming cuts a longer log
            self.save()
            self.last_save = time.time()
        if self.stop:
            raise Interrupted(f"stopped at step {step} of {self.n_steps}")


def train(run, features):
    """Train, or go on training, the model of run.flags on `features`. Returns (model, Log)."""
    flags, rows = run.flags, features.rows("train")
    model = make_model(features, flags, rows).to(flags.device)
    optimiser = sae.make_optimiser(model, flags.lr)
    run.trained_on(features.hash, flags.data)
    run.begin(flags, dims=features.dims, data_hash=features.hash, train_rows=len(rows))
    checkpoint = run.path("checkpoint.pt")
    if run.saved and os.path.exists(checkpoint):
        model, optimiser, _ = sae.load(checkpoint, flags.device)
    batches = data.Batches(rows, flags.batch, flags.seed, flags.shuffle)
    n_steps = flags.epochs * batches.epoch
    log = Log(run.path("log.csv"), int(model.step), ("self", "cross"))

    def batch(step):
        return {s: x.to(flags.device) for s, x in features.batch(batches.rows(step)).items()}

    def on_step(step, result):
        def row():
            told = {"epoch": round(step / batches.epoch, 3), **sae.told(model, result)}
            return {**told, "revive": flags.revive} if "revive" in flags else told

        loss = float(result["loss"]) if step % flags.log_every == 0 else 0.
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {step} - lower --lr, or scale the "
                             "features with --norm")
        keep(step, row, lambda: f"loss {float(result['loss']):.4f}  dead "
             + "/".join(str(int(model.dead(s).sum())) for s in model.streams))
    with Keeper(flags, n_steps, int(model.step), log,
                lambda: sae.save(checkpoint, model, optimiser)) as keep:
        sae.fit(model, batch, n_steps, lr=flags.lr, optimiser=optimiser, on_step=on_step,
                warmup=flags.get("warmup", 0))
    return model, log


def resolved(flags, features, layers=()):
    """The flags with all that was left open filled in: what was typed, else `layers` or the preset,
    else what made-up data want, else by the number of training rows; tells what was chosen."""
    n, layers = len(features.rows("train")), dict(layers)
    if "activation" not in flags and flags.preset:
        if flags.preset != "thesis":
            raise InputError(f"--preset {flags.preset} is of one stream - use it with sae")
        layers |= THESIS | {"targets": max(1, len(features.streams) - 1)}
    layers = {**(PLANTED if flags.data is None else {}), **layers}
    if {"expansion", "latents"} <= flags.given:
        raise InputError(f"--set expansion={flags.expansion} and --latents {flags.latents} - give "
                         "one of the two")
    expansion = flags.get("expansion") or layers.get("expansion")
    if expansion:
        layers["latents"] = expansion * max(features.dims.values())
    flags = flags.replaced({k: v for k, v in layers.items() if k not in flags.given})
    typed = {k: flags[k] for k in ("latents", "k", "batch", "epochs") if flags[k] != "auto"}
    auto = sae.settings_for(n, **typed, streams=len(features.streams))
    auto["shuffle"] = "blocks" if features.mapped else "samples"
    chosen = {k: auto[k] for k, v in flags.items() if v == "auto" and k in auto}
    flags = flags.replaced(chosen)
    if flags.get("null") == "auto":
        flags["null"] = planned_seconds(flags, features.dims, auto["steps"]) < 60
    if chosen:
        shown = ", ".join(f"{k.replace('_', '-')} {v:.2g}" if isinstance(v, float) else
                          f"{k.replace('_', '-')} {v}" for k, v in chosen.items())
        say_once(f"chosen by the number of training rows, {n}: {shown}; {auto['steps']} steps")
    if flags.shuffle == "blocks" and features.sorted_rows():
        say_once("note: the rows are sorted by label, so that blocks of them hold one kind each - "
                 "shuffle the file, or use --shuffle samples")
    return flags


def planned_seconds(flags, dims, steps):
    """About how long training takes on two cores: all logits of a batch, products by sources."""
    sources = min(len(dims), flags.get("targets", len(dims)) + 1)
    logits, products = flags.batch * flags.latents, sources * flags.batch * flags.k
    each = 2e-3 + sum(dims.values()) * (3e-11 * logits + 1e-9 * products)
    return steps * each * (2 if flags.get("topk") == "both" else 1)


def memory():
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make_model(features, flags, rows):
    """The untrained SAE or SPARC of `flags`; its statistics and bias are of the training rows."""
    needs = 32 * flags.latents * sum(features.dims.values())
    if needs > memory():
        raise InputError(f"--latents {flags.latents} needs {needs / 2 ** 30:.0f} GiB for the "
                         "weights alone - lower it")
    shared = {k: flags[k] for k in ("norm", "aux_k", "dead_after", "select", "kernels", "seed")}
    shared["stats"] = features.statistics(rows) if "standard" in flags.norm else None
    shared["reinit_after"] = flags.reinit_after if flags.reinit_after >= 0 else 10 ** 12
    shared["aux_coef"] = flags.aux_coef if flags.aux_k else 0.
    if "activation" not in flags:
        targets = None if flags.targets == "auto" else flags.targets       # of runs without it: all
        return sae.SPARC(features.dims, flags.latents, flags.k, flags.topk, flags.lam, flags.loss,
                         targets=targets, **shared)
    how = {k: flags[k] for k in ("activation", "k", "sparsity", "error", "revive", "bandwidth")}
    model = sae.SAE(features.dims, flags.latents, threshold=flags.theta, **how, **shared)
    if flags.bias != "zeros":
        drawn = np.sort(np.random.default_rng([flags.seed, 5]).permutation(rows)[:32768])
        model.start_bias(features.batch(drawn)[model.streams[0]], flags.bias)
    return model


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------

def evaluation_rows(features, flags, *splits):
    """Rows of the first split that has any, at most --eval-rows of them, drawn with the seed."""
    rows = features.rows(*splits)
    if 0 < flags.eval_rows < len(rows):
        rng = np.random.default_rng([flags.seed, 4])
        rows = np.sort(rng.choice(rows, flags.eval_rows, replace=False))
    return rows


def encoded(model, features, rows, mode, device, block=1024):
    """Yield (x, codes) of `rows`, block by block: dicts stream -> raw (b, d_s) and -> Codes."""
    with torch.no_grad():
        for start in range(0, len(rows), block):
            x = features.batch(rows[start:start + block])
            x = {s: v.to(device) for s, v in x.items()}
            yield x, model.encode(x, mode)


def codes_and_fit(model, features, rows, mode, device):
    """In one pass the codes of `rows`, {stream: CSR (n, L)}, and how they rebuild each stream: a
    dict of r2, nmse and the share of (sample, stream) with its first stream's latents."""
    pieces = []

    def reconstructions():
        for x, codes in encoded(model, features, rows, mode, device):
            pieces.append(codes)
            yield ({t: model.normalise(v, t) for t, v in x.items()},
                   {(t, s): model.decode(c, t).detach() for t in x for s, c in codes.items()})
    fit = judge.reconstruction(reconstructions())
    codes = sae.joined(pieces)
    first = np.full((1, 1), -1)                              # of the first stream that is there
    for indices, _ in codes.values():
        first = np.where(first[:, :1] < 0, indices, first)
    fit["same_choice"] = float(np.mean(np.concatenate(
        [(first == c.indices).all(1)[c.indices[:, 0] >= 0] for c in codes.values()])))
    return {s: judge.sparse_code(*code, model.n_latents) for s, code in codes.items()}, fit


def measure(model, features, flags):
    """All numbers of thesis 5.4.1-5.4.5 and sparc.txt 4.3, joint and alone.

    Returns (metrics, codes {mode: {stream: CSR}}, rows judged)."""
    features, several = features.per_token(), len(model.streams) > 1
    rows = evaluation_rows(features, flags, "test", "val")
    codes, out = {}, {"split": str(features.split[rows[0]]), "rows": len(rows),
                      "of": len(features.rows("test", "val")), "steps": int(model.step),
                      "latents": model.n_latents, "topk": model.topk}
    for mode in ("joint", "alone") if several else ("alone",):
        codes[mode], fit = codes_and_fit(model, features, rows, mode, flags.device)
        out[mode] = {**judge.code_metrics(codes[mode], features, rows), **fit}
        out[mode]["headline"] = judge.headline(out[mode])
    if features.labels is not None:
        out["positives"] = int(features.label_matrix(rows).sum(0).max(initial=0))
    out["l0"] = float(np.mean([code.nnz / max(features.has(s, rows).sum(), 1)
                               for s, code in codes["alone"].items()]))
    if several:
        with torch.no_grad():
            seen = [{s: model.normalise(x.to(flags.device), s).cpu().numpy()
                     for s, x in features.batch(part).items()}
                    for part in (evaluation_rows(features, flags, "train"), rows)]
        raw = {s: x.numpy() for s, x in features.batch(rows).items()}
        out["linear_baseline"] = judge.linear_baseline(*seen)
        here = {s: features.has(s, rows) for s in model.streams}
        out["raw_retrieval"] = judge.retrieval(raw, here)
        if features.lacks:
            out["samples"] = {" / ".join(names): int(np.logical_and.reduce(
                [here[s] for s in names]).sum()) for n in (1, 2)
                for names in itertools.combinations(here, n)}
    if features.truth:
        found = {s: model.dictionary(s).cpu().numpy() for s in model.streams}
        out["recovery"] = judge.recovery(found, features.truth)
    return out, codes, rows


def judged(run, features, whole=None, quiet=False):
    """Train, with --null once more on shuffled streams, and measure; write metrics.json and
    report.html. whole: the run that --null would be added to. Returns metrics."""
    flags, began = run.flags, time.time()
    model, log = train(run, features)
    trained = time.time()
    metrics, codes, rows = measure(model, features, flags)
    if flags.get("null"):
        say("the null: the same again with every stream but the first shuffled")
        shuffled, part = features.shuffled(flags.seed), flags.replaced({"null": False})
        null, _, _ = measure(train(run.part("null", part), shuffled)[0], shuffled, flags)
        metrics["null"] = {mode: null[mode] for mode in ("joint", "alone")}
    metrics["verdict"] = judge.verdict(
        metrics, whole and f"add it with python repsae.py {flags.command} --resume --null --out "
                           f"{shlex.quote(whole.folder)}")
    settings = {**flags, "seconds to train": round(trained - began, 1),
                "seconds to measure": round(time.time() - trained, 1)}
    page = judge.Page(f"repsae {flags.command}: {os.path.basename(os.path.abspath(run.folder))}")
    judge.tell_summary(page, metrics, quiet)
    judge.tell_run(page, metrics, log.rows, settings, codes, features, rows)
    page.write(run.path, metrics)
    if not quiet:
        say(f"wrote {run.join('report.html')}")
    return metrics


def judged_parts(run, trials, tell, whole=None):
    """Train and judge each of `trials`, {name: (flags, features)}, in a folder of the run, and put
    them beside each other: tell(page, {name: metrics}) may return a chart."""
    results, page = {}, judge.Page(f"repsae {run.flags.command}: {os.path.basename(run.folder)}")
    for name, (flags, features) in trials.items():
        say(f"-- {name}")
        began = time.time()
        results[name] = judged(run.part(name, flags), features, whole, quiet=True)
        results[name]["seconds"] = round(time.time() - began, 2)
    chart = tell(page, results)
    if chart:
        judge.write_text(run.path("sweep.svg"), judge.standalone_svg(chart))
    page.write(run.path, results)
    say(f"wrote {run.join('report.html')}; each run has its own in a folder beside it")


def read(flags):
    """The features that the flags name, or the made-up ones; says what is to be known of them."""
    names = flags.streams.split(",") if flags.streams else None
    if flags.data is not None:
        features = data.read_features(flags.data, names, flags.taxonomy, flags.seed)
    else:
        features = data.planted_streams(seed=flags.seed)
        for s in names or ():
            if s not in features.streams:
                raise InputError(f"the made-up data has no stream '{s}' - "
                                 f"it has {', '.join(features.streams)}")
        features.streams = {s: features.streams[s] for s in names or features.streams}
        features.truth = {s: features.truth[s] for s in features.streams}
    for note in features.notes:
        say_once("note: " + note)
    return features


def read_to_train(flags, least=1):
    """`read`, once there is something to train on, something to judge by, and `least` streams."""
    features = read(flags)
    features.rows("test", "val")
    if len(features.streams) < least:
        raise InputError(f"{flags.command} shares a code among streams and needs two streams, not "
                         f"{list(features.streams)[0]} alone - give more, or use sae for one")
    flat = features.per_token()
    if len(flat.rows("train")) < 2:
        raise InputError("the train split has 1 sample - give at least two to learn from")
    for s in flat.lacks:
        if flat.has(s, flat.rows("train")).sum() < 2:
            raise InputError(f"stream '{s}' is missing in the train split - leave it out")
    if features.tokens:
        say_once(f"note: {len(features)} samples of {features.tokens} tokens, and each token "
                 "counts as a sample")
    return features.per_token()


# ------------------------------------------------------------------------------------------------
# A run in use: its model, features and codes
# ------------------------------------------------------------------------------------------------

class Coded:
    """A run's model with features, its own or those of --data, and the codes of their streams.

    flags   the command's, with the run's own data, seed and (if it takes one) taxonomy where none
            were typed
    T       tokens of a sample, 1 where it is one vector
    """

    def __init__(self, run, flags, streams=None):
        if not os.path.exists(os.path.join(run, "config.json")):
            raise InputError(f"{run} is no run folder - name one that sparc or sae wrote")
        own = read_config(run, ("data", "taxonomy", "seed"))["flags"]
        own = {k: own[k] for k in ("data", "taxonomy", "seed")
               if k in own and k in flags and k not in flags.given}
        flags = flags.replaced({"taxonomy": None, **flags, **own})
        self.run, self.device = run, flags.device
        self.model, _, _ = sae.load(os.path.join(run, "checkpoint.pt"), flags.device)
        there = data.stream_names(flags.data) if flags.data else self.model.streams
        known = [s for s in self.model.streams if s in there]
        streams = streams or flags.get("stream") or flags.get("streams") or ",".join(known)
        if not known:
            raise InputError(f"{flags.data} has {', '.join(there) or 'no streams'}, the run knows "
                             f"{', '.join(self.model.streams)} - check the keys")
        self.flags = flags.replaced({"streams": streams})
        self.features = read(self.flags)
        for s, d in self.features.dims.items():
            if self.model.dims.get(s) != d:
                raise InputError(f"the run was trained on {self.model.dims}, the data has "
                                 f"{self.features.dims} - take streams that it knows")
        self.T, self.flat = self.features.tokens or 1, self.features.per_token()

    def codes(self, rows, mode="alone"):
        """Codes of samples (n,), token by token: {stream: CSR (n * T, L)}."""
        tokens = (np.asarray(rows)[:, None] * self.T + np.arange(self.T)).ravel()
        blocks = encoded(self.model, self.flat, tokens, mode, self.device)
        found = sae.joined([codes for _, codes in blocks])
        return {s: judge.sparse_code(*v, self.model.n_latents) for s, v in found.items()}

    def pool(self, tau=0.):
        """Of the one stream, alone: `strength` and `count`, CSR (N, L), of `judge.pool_tokens`,
        `dense` (N, d), normalised features, the mean over tokens, and `groups` (N,)."""
        if len(self.features.streams) > 1:
            raise InputError(f"{self.run} has the streams {', '.join(self.features.streams)} - "
                             f"pick one with --stream{'' if 'stream' in self.flags else 's a,b'}")
        (s,), T, N, pooled, dense = self.features.streams, self.T, len(self.features), [], []
        for x, codes in encoded(self.model, self.flat, np.arange(N * T), "alone", self.device,
                                T * max(1, 4096 // T)):
            code = judge.sparse_code(*sae.joined([codes])[s], self.model.n_latents)
            pooled.append(judge.pool_tokens(code, T, tau))
            dense.append(self.model.normalise(x[s], s).unflatten(0, (-1, T)).mean(1).cpu().numpy())
        self.strength, self.count = (sp.vstack(part).tocsr() for part in zip(*pooled))
        self.stream, self.dense = s, np.nan_to_num(np.concatenate(dense))      # 0 where missing
        if not np.isfinite(self.strength.data).all():
            raise InputError(f"the codes of {self.run} are not finite - train it with a lower --lr")
        if not self.strength.nnz:
            raise InputError(f"no latent of {self.run} is active on any sample - train it longer, "
                             "or with less sparsity")
        self.groups = self.features.about.get("groups", np.arange(N))
        self.train, self.test = self.features.rows("train"), self.features.rows("test", "val")
        return self

    def decoder(self):
        """Dictionary (L, d) and bias (d,) of the one stream."""
        return (v[self.stream].detach().cpu().double().numpy()
                for v in (self.model.W_dec, self.model.b_pre))

    def heat(self, row, latents):
        """Activations of some latents over a sample's patches: (len(latents), rows, columns)."""
        code = self.codes([row])[self.stream][:, latents]
        return code.toarray().T.reshape(-1, *self.features.grid)

    def boxes(self, row, label):
        """The boxes x0, y0, x1, y1 of a label in a sample, in shares of the picture."""
        known = self.features.boxes
        return () if known is None else [
            tuple(b[2:]) for b in known[(known[:, 0] == row) & (known[:, 1] == label)]]

    def told(self, name=None):
        """(y (N,) int, rows to learn from, rows to judge by), labelled rows alone: has a sample the
        label? Without a name, its class; y is None where samples have no or several labels."""
        features, y, parts = self.features, self.features.labels, (self.train, self.test)
        if name is not None:
            label = label_number(features, name)
            y = features.label_matrix(np.arange(len(features)))[:, label].astype(int)
        elif y is None or y.ndim > 1 or len(np.unique(y[y >= 0])) < 2:
            return None, *parts
        parts = [rows[features.labelled[rows]] for rows in parts]
        train, test = (np.unique(y[rows]) for rows in parts)
        if len(train) < 2 or len(test) < 1 + (name is not None) or not np.isin(test, train).all():
            raise InputError(f"{name or 'the labels'}: {len(train)} kinds of training samples, "
                             f"{len(test)} of test samples - both need two, the same; mend `split`")
        return y, *parts

    def about(self, row):
        """What the file tells of a sample, as a dict of text; no label where it is not known."""
        features, labels = self.features, self.features.label_matrix([row])
        found = {k[:-1]: str(v[row]) for k, v in features.about.items() if v.ndim == 1}
        if features.labelled[row]:
            names = [name for name, here in zip(features.label_names, labels[0]) if here]
            found["label"] = ", ".join(names) or "none"
        return {"sample": int(row), **found}


def label_number(features, label):
    """The number of a label given by name or number; raises InputError when there is none of it."""
    if label in features.label_names:
        return features.label_names.index(label)
    if label is not None and label.isdecimal() and int(label) < len(features.label_names):
        return int(label)
    known = ", ".join(features.label_names[:20]) or "none: the file has no labels"
    raise InputError(f"no label '{label}' - take one of {known}")


def analysis_run(flags, name):
    """The Run that an analysis of a run writes: --out, or the folder `name` inside that run."""
    if not flags.out and (not plain(name) or "/" in name):
        raise InputError(f"{name!r} cannot be the name of a folder - name one with --out")
    return Run(flags, flags.out or os.path.join(flags.run, name))


# ------------------------------------------------------------------------------------------------
# Sparse codes: training and using them (thesis 4.1, 5)
# ------------------------------------------------------------------------------------------------

@command(f"{DATA} {CODE} {SHARED} preset null {STEPS} {FOLDER} out=runs/sparc")
def cmd_sparc(flags):
    """Train SPARC on two streams or more, and report every cross-stream number joint and alone."""
    run = Run(flags)
    features = read_to_train(run.flags, 2)
    run.flags = run.flags if run.saved else resolved(flags, features)
    judged(run, features, run)


@command(f"{DATA} stream {CODE} {KINDS} activation revive preset {STEPS} {FOLDER} out=runs/sae")
def cmd_sae(flags):
    """Train a sparse autoencoder on one stream (thesis 4.1 and its relatives), or every kind."""
    run = Run(flags)
    features = one_stream(run.flags)
    if run.flags.activation == "all":
        return every_activation(run, features)
    run.flags = run.flags if run.saved else resolved_sae(flags, features)
    judged(run, features)


def resolved_sae(flags, features):
    """`resolved` for one stream: the activation and the preset have settings of their own."""
    preset = PRESETS.get(flags.preset, {})
    typed = "activation" in flags.given
    activation = flags.activation if typed else preset.get("activation", flags.activation)
    sae.one_of("activation", activation, sae.ACTIVATIONS)
    own = sae.ACTIVATIONS[activation]
    planted = PLANTED_SAE.get(activation, {}) if flags.data is None else {}
    layers = {"error": own.error, "revive": own.revive, "sparsity": own.sparsity, **planted,
              **preset, "activation": activation}
    flags = resolved(flags.replaced({"null": False}), features, layers)
    if flags.sparsity and not own.sparsity:
        raise InputError(f"--sparsity {flags.sparsity} has no effect on {activation}, which has no "
                         "penalty - leave it out, or set --k")
    say_once(f"note: what is done about latents that have not fired for {flags.dead_after} steps: "
             f"{flags.revive}")
    return flags


def one_stream(flags):
    """The features of --stream, every token a sample."""
    stream = flags.stream or ("vision" if flags.data is None else None)
    features = read_to_train(flags.replaced({"streams": stream or flags.streams}))
    if len(features.streams) > 1:
        raise InputError(f"{flags.data} has the streams {', '.join(features.streams)} - "
                         "pick one with --stream")
    return features


def every_activation(run, features):
    """Each activation with what revives its dead latents, and relu with others, in one table: R2,
    active and silent latents, planted concepts found."""
    flags, trials = run.flags, {}
    kinds = [{"activation": name} for name in sae.ACTIVATIONS]
    after = kinds.index({"activation": "relu"}) + 1
    kinds[after:after] = [{"activation": "relu", "revive": how} for how in ("none", "ghost")]
    for kind in kinds:
        one = flags.replaced(kind)
        one.given = flags.given | kind.keys()
        one = resolved_sae(one, features)
        trials[f"{one.activation}_{one.revive}"] = one, features
    sae.make_optimiser(sae.SAE({"x": 2}, 2, k=1))            # what it loads is in no row's seconds
    run.begin(flags, data_hash=features.hash)
    judged_parts(run, trials, judge.tell_activations)


@command(f"{DATA} seed device eval-rows json overwrite", "run")
def cmd_eval(flags):
    """Measure a trained run again, on its own data or on other features of the same streams."""
    path, coded = flags.json and out_file(flags, "json"), Coded(flags.run, flags)
    model, features, flags = coded.model, coded.features, coded.flags
    for s in model.streams:
        if s not in features.streams:
            raise InputError(f"the data lacks the run's stream '{s}' - "
                             f"eval needs {', '.join(model.streams)}")
    metrics, _, _ = measure(model, features, flags)
    judge.tell_summary(judge.Page(""), metrics)
    if path:
        judge.write_json(path, metrics)
        say(f"wrote {path}")


@command(f"{DATA} seed device mode overwrite out=codes.npz", "run")
def cmd_encode(flags):
    """Write the sparse codes of features: <stream>_indices and _values, (N, k), or (N, T, k).

    Samples with fewer active latents may be filled up with index -1, value 0."""
    out_file(flags)
    coded = Coded(flags.run, flags)
    model, features, flat = coded.model, coded.features, coded.flat
    pieces = encoded(model, flat, np.arange(len(flat)), flags.mode, flags.device)
    shape = (len(features), *([features.tokens] if features.tokens else []), -1)
    kept = {"n_latents": model.n_latents, "mode": flags.mode}
    for s, code in sae.joined([codes for _, codes in pieces]).items():
        for name, v in code._asdict().items():
            kept[f"{s}_{name}"] = v.reshape(shape)
    if "ids" in features.about:
        kept["ids"] = features.about["ids"]
    judge.write_npz(out_file(flags), kept)
    say(f"wrote {flags.out}: {len(features)} samples, {', '.join(features.streams)}, {flags.mode}")


@command(f"{DATA} over! {CODE} {SHARED} preset {STEPS} {FOLDER} out=runs/sweep")
def cmd_sweep(flags):
    """A run for every combination of settings, or of sets of streams, beside each other (thesis
    5.4.8, sparc.txt 5, B and C): --over "topk=global,local latents=256,512"."""
    run = Run(flags)
    axes = parse_axes(run.flags)
    sweep(run, axes, functools.partial(judge.tell_sweep, axes=axes))


ABLATION = {"global_lam1", "global_lam0", "local_lam1", "local_lam0", "both_lam1", "random_lam1"}


@command(f"{DATA} {CODE} loss targets preset null {STEPS} {FOLDER} out=runs/ablate")
def cmd_ablate(flags):
    """The 2x2 of thesis 5.3.4 plus `both` and `random`, joint and alone, each with its null."""
    run = Run(flags)
    axes = {"topk": ["global", "local", "both", "random"], "lam": [1., 0.]}
    sweep(run, axes, judge.tell_ablation, ABLATION, run)


def sweep(run, axes, tell, only=None, whole=None):
    """`judged_parts` of all combinations of the values in `axes`, or of those named `only`. A name
    is made of the values: global_lam1."""
    features, trials = read_to_train(run.flags, 2), {}
    flags = run.flags if run.saved else resolved(run.flags, features)
    for values in itertools.product(*axes.values()):
        one = dict(zip(axes, values))
        name = "_".join(v if isinstance(v, str) else f"{key}{v:.9g}" for key, v in one.items())
        if only and name not in only:
            continue
        trial, mine = flags.replaced(one), features
        if {"streams", "seed"} & one.keys():                 # the seed draws the split too
            trial["streams"] = (trial.streams or "").replace("+", ",")
            mine = read_to_train(trial, 2)
        sae.SPARC(mine.dims, trial.latents, trial.k)         # before anything is written
        trials[name] = trial, mine
    run.begin(flags, data_hash=features.hash)
    judged_parts(run, trials, tell, whole)


def parse_axes(flags):
    """The flag --over, "lr=1e-4,5e-4 k=2,4" -> {setting of the command: its values}."""
    known = {*MODEL, *TRAINING, *SETTINGS} & {*COMMANDS[flags.command].flags}
    text, axes = flags.over, {}
    for word in [] if text is None else text.split() or [text]:
        name, _, values = word.partition("=")
        kind = FLAGS[name][1] if name in known else None
        if isinstance(kind, Number):                         # a value to compare is not "auto"
            kind = Number(kind.kind, kind.least, kind.most)
        elif name == "streams" and all(s for v in values.split(",") for s in v.split("+")):
            kind = str
        elif not isinstance(kind, tuple) or name in axes or "auto" in values.split(","):
            raise InputError(f'--over {word} - write for example "topk=global,local lam=0,1" or '
                             '"streams=a+b,a+b+c"')
        try:
            values = dict.fromkeys(value_of(kind, v) for v in values.split(","))
            axes[name.replace("-", "_")] = [*values]
        except argparse.ArgumentTypeError as e:
            raise InputError(f"--over {word}: {e}")
    return axes


# ------------------------------------------------------------------------------------------------
# Backbones: DINO, features, probes (thesis 3.2)
# ------------------------------------------------------------------------------------------------

@command("images! window arch patch size=224 local-size local-crops global-scale local-scale blur "
         "colour pathology standardise prototypes head-hidden bottleneck norm-last teacher-temp "
         "teacher-temp-start teacher-warmup epochs=100 batch=512 lr=5e-4 warmup=10 min-lr "
         "weight-decay=0.04 weight-decay-end decay-ssm momentum clip freeze-last drop-path "
         "knn-every workers seed=0 device log-every save-every overwrite resume out=runs/dino")
def cmd_dino(flags):
    """Pre-train a backbone on pictures without labels (DINO, thesis 3.2.1); labels, if there, only
    watch over it (k-NN)."""
    run = Run(flags)
    flags, images = run.flags, pictures_of(run.flags)
    rows = images.rows("train")                              # all, where there is no split
    if len(rows) < 2:
        raise InputError(f"{flags.images} has {len(rows)} picture to train on - give at least two")
    run.trained_on(images.hash, flags.images)
    torch.set_flush_denormal(True)                           # far tokens' gradients get that small
    torch.manual_seed(flags.seed)
    nets = ssm.dino_nets(**flags.pick("arch size patch prototypes head_hidden bottleneck norm_last "
                                      "drop_path decay_ssm device"))
    if flags.standardise:
        for net in nets[:2]:
            ssm.standardise_pixels(net, *data.pixel_statistics(images, rows), data.IMAGENET)
    with torch.no_grad():                                    # sizes that do not fit fail here
        nets[1]([torch.zeros(1, 3, side, side, device=flags.device)
                 for side in (flags.size, flags.local_size)])
    areas = [two_numbers(flags, name, 0, 1) for name in ("global_scale", "local_scale")]
    crops = data.Crops(flags.size, flags.local_size, flags.local_crops, *areas, flags.blur,
                       flags.colour, flags.pathology)
    run.begin(flags, data_hash=images.hash, pictures=len(images))
    watch = Watch(images, flags)                             # labels serve this alone
    tell_dino(run, nets[1].backbone, train_dino(run, nets, images, crops, watch), watch)


def pictures_of(flags):
    """The pictures that --images names, grey values as --window says."""
    images = data.read_images(flags.images)
    images.window = grey_window(flags)
    for note in images.notes:
        say_once("note: " + note)
    return images


def grey_window(flags):
    """The two grey values of --window, or None."""
    return two_numbers(flags, "window", -sys.float_info.max, sys.float_info.max, "0,4095")


def two_numbers(flags, name, least, most, example="0.4,1"):
    """"0.4,1" -> (0.4, 1.0), in order, above `least`, at most `most`; None if not given."""
    if flags[name] is None:
        return None
    try:
        low, high = map(float, flags[name].split(","))
        if least < low <= high <= most and (low < high or name != "window"):
            return low, high
    except ValueError:
        pass
    raise InputError(f"--{name.replace('_', '-')} {flags[name]} - give two numbers in order, for "
                     f"example {example}")


def needed(flags, name):
    """The value of a flag that has no default; raises InputError when it was not given."""
    if not flags[name]:
        raise InputError(f"--{name} is missing - see python repsae.py {flags.command} --help")
    return flags[name]


def train_dino(run, nets, images, crops, watch):
    """Train the `nets`, or go on training them; returns the Log. Stops when they have collapsed."""
    flags, checkpoint, step, most = run.flags, run.path("checkpoint.pt"), 0, 0.
    if run.saved and os.path.exists(checkpoint):
        with unpacked(checkpoint, "is no checkpoint of this run", "train anew with --overwrite",
                      flags.device) as kept:
            step, most = ssm.restore_dino(nets, kept), float(kept["most"])
    batches = data.Batches(images.rows("train"), flags.batch, flags.seed, "samples", drop_last=True)
    epoch, n_steps = batches.epoch, flags.epochs * batches.epoch  # epoch: steps in one
    columns = ("loss", "entropy", "information", "knn")      # may be empty, in step 0
    log = Log(run.path("log.csv"), step, columns, gaps=columns)
    if not step and watch.tasks:
        knn = watch.knn(nets[1].backbone)
        log.add({"step": 0, "epoch": 0, **dict.fromkeys(columns, ""), "knn": knn})
        say(f"before training: k-NN {knn:.3f} ({watch.measure}), raw pixels {watch.knn():.3f}")

    def on_step(t, told):
        nonlocal step, most
        step, ended, knn = t, t % epoch == 0, ""             # step, most: for the checkpoint
        most = max(most, told["information"])
        if ended and watch.tasks and (t // epoch % flags.knn_every == 0 or t == n_steps):
            knn = watch.knn(nets[1].backbone)                # of the teacher, as in DINO
        words = f"loss {told['loss']:.3f}  information {told['information']:.2f}"
        keep(t, lambda: {"epoch": round(t / epoch, 3), **told, "knn": knn},
             lambda: words + (f"  k-NN {knn:.3f}" if knn != "" else ""), log=ended)
        if ended:
            refuse_collapse(most, told["entropy"], t // epoch, flags.prototypes)
            most = 0.
    settings = flags.pick("epochs min_lr warmup weight_decay weight_decay_end momentum "
                          "teacher_temp teacher_temp_start teacher_warmup clip freeze_last")
    schedule = functools.partial(ssm.dino_schedule, epoch=epoch, lr=flags.lr * flags.batch / 256,
                                 **settings)                 # lr grows with the batch, as DINO's
    views = data.crop_batches(images, crops, batches, flags.seed, step, n_steps, flags.workers)
    with Keeper(flags, n_steps, step, log, lambda: judge.write_torch(
            checkpoint, {**ssm.dino_state(nets, step), "most": most})) as keep:
        ssm.fit_dino(nets, lambda t: next(views), n_steps, schedule, on_step, step, flags.seed)
    return log


def refuse_collapse(most, entropy, epoch, K, least=1e-3):
    """Raise InputError if in a whole epoch the teacher's output told `most` < `least` nats of its
    picture; by its entropy the collapse was to one output or to all."""
    if most < least:
        kind = "uniform" if entropy > 0.9 * math.log(K) else "constant"
        raise InputError(f"collapse: the teacher's output was {kind} for every picture all through "
                         f"epoch {epoch} (entropy {entropy:.3f} of ln K = {math.log(K):.3f}) - "
                         "lower --lr or the teacher's temperature, or raise --batch or --warmup")


class Watch:
    """Looks at a backbone from outside: what the nearest neighbours of pictures know of their
    labels, where they have any (`tasks`)."""

    def __init__(self, images, flags, most=4000):
        self.images, self.tasks = images, []
        self.features = functools.partial(image_features, images, size=flags.size)
        self.rows = [rows[images.labelled[rows]] for rows in images.knn_rows(flags.seed, most)]
        if all(map(len, self.rows)):
            self.tasks = judge.label_tasks(images.labels, *self.rows)
            several = images.labels.ndim == 2                # labels that hold at once
            self.measure = "AUC" if several else "balanced accuracy"
            self.classes = 2 if several else len(images.label_names)

    def knn(self, backbone=None):
        """`measure` of the 20 nearest neighbours by features; without a backbone by raw pixels."""
        x = [self.features(rows, backbone) for rows in self.rows]  # to vote, to be judged
        found = judge.judged_features(*x, self.tasks, self.rows, self.classes, ks=(20,))
        return found["20-NN"][self.measure]

    def neighbours(self, backbone):
        """Twelve held-out pictures, spread evenly, each before its seven nearest in training: a
        list of rows of pictures."""
        train, test = self.rows
        asked = test[np.linspace(0, len(test) - 1, min(12, len(test))).astype(int)]
        near, _ = judge.nearest(*(self.features(rows, backbone) for rows in (asked, train)), 7)
        return [[self.images.open(i) for i in (row, *train[found])]
                for row, found in zip(asked, near)]


def image_features(images, rows, backbone, size, block=256, whole=False, **how):
    """Features (n, d) of pictures, tokens (n, T, d) in half precision; without a backbone the
    pixels themselves. how: see `features` of the backbone."""
    view, found = data.plain_view(size, whole or images.whole), []
    images.side = max(size, images.side)                     # slides are read at that level
    for start in range(0, len(rows), block):
        out = torch.stack([view(images.open(i)) for i in rows[start:start + block]])
        if backbone is not None:
            with torch.no_grad():
                out = backbone.features(out.to(next(backbone.parameters()).device), **how)
        out = out[0].half() if isinstance(out, tuple) else out.flatten(1)        # tokens, grid
        found.append(out.cpu().numpy())
    return np.concatenate(found)


def tell_dino(run, backbone, log, watch):
    """metrics.json and report.html, with curves.svg and neighbours.png."""
    page = judge.Page(f"repsae dino: {run.flags.arch}")
    curves = {k: [(int(row["step"]), float(row[k])) for row in log.rows if row[k]]
              for k in ("loss", "entropy", "information", "knn")}
    charts = [judge.svg_lines({"loss": curves["loss"]}, "step", "loss"), judge.svg_lines(
        {k: curves[k] for k in ("entropy", "information")}, "step", "the teacher's output, nats")]
    found = {k: line[-1][1] for k, line in curves.items() if line}               # the last of each
    page.picture("Training", "".join(charts))
    if watch.tasks:
        pixels, pictures = watch.knn(), watch.neighbours(backbone)
        found["knn_pixels"] = pixels
        if curves["knn"] and curves["knn"][0][0] == 0:       # else the log was lost on the way
            found["knn_random"] = curves["knn"][0][1]
        lines = {"teacher": curves["knn"], "raw pixels": [(x, pixels) for x, _ in curves["knn"]]}
        charts.append(judge.svg_lines(lines, "step", f"20-NN, {watch.measure}", zero=False))
        page.picture("k-NN on held-out pictures", charts[-1])
        titles = ["picture", *(f"neighbour {i}" for i in range(1, len(pictures[0])))]
        judge.save_picture(run.path("neighbours.png"), judge.contact_sheet(pictures, titles, 96))
        page.picture("Nearest neighbours in the training pictures", "".join(
            judge.strip(*(judge.embedded(p, 96) for p in row)) for row in pictures))
    judge.write_text(run.path("curves.svg"), judge.standalone_svg(*charts))
    page.text("  ".join(f"{k} {v:.3f}" for k, v in found.items()))
    page.write(run.path, found)
    say(f"wrote {run.join('report.html')}")


@command("images! weights! window size standardise last tokens whole seed=0 device overwrite "
         "out=feats.npz")
def cmd_extract(flags):
    """Features of pictures by one or more backbones: an .npz of streams that `sparc` and `probe`
    read."""
    images, out, streams = pictures_of(flags), out_file(flags), {}
    captions, known = images.about.get("captions"), images.rows("train")
    specs = flags.weights.split(",")
    for spec in [spec for spec in specs if "=lsa:" in spec]:
        name, longest = spec.split("=lsa:")
        if captions is None or flags.tokens or longest not in ("1", "2", "3"):
            raise InputError(f"{spec} - lsa:1 to lsa:3 (longest run of words) read captions, and "
                             "have no tokens")
        streams[name] = data.latent_semantics(captions, known, int(longest))
        specs.remove(spec)
    for name, model, side in [load_backbone(spec, flags) for spec in specs]:
        if flags.standardise and model.random:
            ssm.standardise_pixels(model, *data.pixel_statistics(images, known), data.IMAGENET)
        clip = getattr(model, "clip", None)                  # one run, two encoders
        if clip and captions is not None and not flags.tokens:
            texts = ssm.text_features(clip, model.words, captions)
            streams[f"{name}_txt"] = texts.cpu().numpy()
        how = {"block": 16, "tokens": True} if flags.tokens else {}  # T times the memory
        if hasattr(model, "blocks") and not flags.tokens:
            how["last"] = flags.last                         # a ViT has a class token in each
        streams[name + "_img" * bool(clip)] = image_features(
            images, range(len(images)), model, flags.size or side,
            whole=flags.whole or bool(clip), **how)          # clip learns from whole pictures
    for name, x in streams.items():
        say(f"{name}: {x.shape}")
    about = images.arrays(out)
    if flags.tokens:
        about["grid"] = np.repeat(math.isqrt(x.shape[1]), 2)                     # views are square
    judge.write_npz(out, {**streams, **about})
    say(f"wrote {out}")


def source_of(spec, flags):
    """(name, what builds the backbone, the file of its weights or None) of a spec in --weights:

    name=RUN        a run of dino, or of clip (which is built from its own file)
    name=FILE.pt    what finetune wrote
    name=arch:FILE  released weights of a preset of ssm.py, or of a classifier of torchvision
    name=arch:random, or an arch alone: weights drawn with --seed
    """
    name, _, where = spec.partition("=") if "=" in spec else (spec, "", f"{spec}:random")
    arch, _, weights = where.partition(":")
    if not where or not plain(name) or "/" in name:          # it names files, too
        raise InputError(f"{spec} - write name=RUN, name=arch:FILE or name=arch:random, separated "
                         "by commas")
    made = {"arch": arch, "size": None, "patch": flags.get("patch"), "n_classes": None}
    if weights == "random":                                  # of any size
        return name, {**made, "size": flags.get("size") or None}, None
    if weights:
        return name, made, weights
    if where.endswith(".pt"):                                # what finetune wrote says what it is
        advice = f"write {name}=arch:FILE for others"
        with unpacked(where, "is no file of finetune", advice) as kept:
            made = {key: kept[key] for key in made}
        check_kinds(made, {"arch": "vim_small", "size": None, "patch": None}, where)
        if made["n_classes"] is not None and type(made["n_classes"]) is not int:
            raise InputError(f"{where} has {made['n_classes']!r} as n_classes - train it anew")
        return name, made, where
    if os.path.exists(os.path.join(where, "clip.pt")):
        return name, {"arch": "clip"}, where
    if not os.path.exists(os.path.join(where, "config.json")):
        raise InputError(f"{where} is no dino run - give its folder, or write {name}=arch:FILE")
    theirs = read_config(where, ("arch", "size", "patch"))["flags"]
    made.update({key: theirs.get(key, FLAGS[key][0]) for key in ("arch", "size", "patch")})
    return name, made, os.path.join(where, "checkpoint.pt")


def load_backbone(spec, flags, n_classes=0, head=False):
    """(name, model, the side it was trained at) of a spec, see `source_of`. With n_classes it gets
    a new head of so many; with `head` it keeps its file's. `made` of the model builds it again;
    `random` says whether its weights are."""
    name, made, weights = source_of(spec, flags)
    if made["arch"] == "clip":
        model, side = load_clip(weights, flags.device)
        model.random = False
        return name, model, side
    torch.manual_seed(flags.seed)
    if made["arch"] not in ssm.PRESETS and n_classes:
        model = torchvision_model(made["arch"], weights, n_classes)
        made.update(size=flags.size, patch=None)
    else:
        built = {**made, "n_classes": made["n_classes"] if head else None}  # as the file has it
        model = ssm.make_backbone(**built)
        if weights:
            ssm.load_weights(model, weights)
        if n_classes:                                        # all weights but the head's
            bare, model = model, ssm.make_backbone(**{**made, "n_classes": n_classes})
            model.load_state_dict(bare.state_dict(), strict=False)
    model.made, model.random = {**made, "n_classes": n_classes or made["n_classes"]}, not weights
    return name, model.eval().to(flags.device), getattr(model, "size", made["size"] or 224)


def torchvision_model(name, path, n_classes):
    """A classifier of torchvision by name, its last layer new. path: a released state_dict or
    None."""
    models = data.vision().models
    if name not in models.list_models(module=models):
        raise InputError(f"{name} is neither a preset of ssm.py nor a classifier of torchvision - "
                         "try vit_micro, resnet18")
    model = models.get_model(name, num_classes=n_classes)
    if path:
        advice = "give torchvision's file"
        with unpacked(path, f"does not hold the weights of {name}", advice) as state:
            own, last = model.state_dict(), ssm.last_linear(model)[0]
            model.load_state_dict({k: own[k] if k.rpartition(".")[0] == last else v
                                   for k, v in state.items()})
    return model


@command(f"{DATA} seed solver strength only json overwrite")
def cmd_probe(flags):
    """Linear probe and weighted k-NN on features: how well do they tell the labels apart (thesis
    3.2.3)?"""
    path, features = flags.json and out_file(flags, "json"), read_to_train(flags)
    y, names = features.labels, features.label_names
    if y is None:                                            # tokens have none
        raise InputError(f"{flags.data or 'the made-up data'} has no labels, one or more a sample "
                         "- add them as `labels`")
    wanted = flags.only.split(",") if flags.only else names
    chosen = sorted({label_number(features, name) for name in wanted})           # their numbers
    several = y.ndim == 2                                    # may hold at once: one by one
    whole = [features.has(s, np.arange(len(y))) for s in features.streams]       # of every stream
    known = np.flatnonzero(features.labelled & (several or np.isin(y, chosen)) & np.all(whole, 0))
    rows = [np.intersect1d(features.rows(*s), known) for s in (("train",), ("test", "val"))]
    train, test = rows
    tasks = judge.label_tasks(y[:, chosen] if several else np.searchsorted(chosen, y), *rows)
    if not len(test) or not tasks or len(np.unique(tasks[0][train])) < 2:
        raise InputError("the training split has fewer than two classes, or nothing is left to "
                         "test on - mend `split` or `labels`")
    for c in [] if several else np.setdiff1d(y[test], y[train])[:1]:
        raise InputError(f"no training sample has the label '{names[c]}' of test samples - mend "
                         "`split`, or name the others with --only")
    if several and len(tasks) < len(chosen):
        say(f"note: {len(chosen) - len(tasks)} labels that all or none have, in training or in "
            "test, are left out")
    linear = functools.partial(judge.sgd_probe, seed=flags.seed) if flags.solver == "sgd" else \
        functools.partial(judge.logistic_probe, strength=flags.strength)
    found = {}
    for s in features.streams:
        x = (features.batch(part)[s].numpy() for part in rows)
        C = 2 if several else len(chosen)                    # has it or not, or which of them
        found[s] = judge.judged_features(*x, tasks, rows, C, linear)
    cells = [[f"{s}, {way}", *v.values()] for s in found for way, v in found[s].items()]
    print(judge.text_table(["", "accuracy", "balanced accuracy", "F1", "AUC"], cells))
    print(f"{len(train)} samples to learn from, {len(test)} to test on"
          + f"; mean over {len(tasks)} labels" * several)
    if path:
        judge.write_json(path, found)


# ------------------------------------------------------------------------------------------------
# What latents are and do: CytoSAE, Mammo-SAE, the TotalSegmentator study, thesis 4.3
# ------------------------------------------------------------------------------------------------

@command(f"{ON_RUN} stream tau top weighted between names query embeddings label prompts", "run")
def cmd_latents(flags):
    """What each latent is: frequency, mean, label entropy, reference samples, barcodes of patients
    (CytoSAE). --prompts: a file to have them named by; --query: the samples that names find."""
    prompts = flags.prompts and out_file(flags, "prompts")
    coded = Coded(flags.run, flags).pool(flags.tau)
    names = data.read_names(flags.names, coded.model.n_latents) if flags.names else {}
    if prompts:
        return write_prompts(coded, prompts, flags.top)
    if flags.query or flags.embeddings:
        return search(coded, names, flags)
    run, features, train = analysis_run(flags, "latents"), coded.features, coded.train
    page = judge.Page(f"repsae latents: {os.path.basename(os.path.abspath(flags.run))}")
    known = features.labelled[train]
    table = judge.latent_table(coded.strength[train], coded.count[train],
                               features.label_matrix(train) if known.any() else None, flags.top,
                               flags.weighted, known)
    scatter, references = judge.latent_scatter(table), table.pop("references")
    shown = tell_table(page, table, features.label_names, len(train), names)
    page.picture("Latents by frequency and mean activation", "".join(scatter))
    barcodes = tell_barcodes(page, coded, table["mean"], flags.between)
    best = {j: train[judge.best_first(references, j)] for j in shown[:24]}
    page.picture("Reference samples", judge.strips({
        f"latent {j} {names.get(j, '')}": [reference(coded, row, j) for row in rows[:6]]
        for j, rows in best.items()}))
    run.begin()
    if barcodes:
        judge.write_npz(run.path("barcodes.npz"), barcodes)
    judge.write_text(run.path("scatter.svg"), judge.standalone_svg(*scatter))
    judge.write_json(run.path("latents.json"), [
        {"latent": int(j), **{k: judge.plain(v[j]) for k, v in table.items()},
         "references": train[judge.best_first(references, j)].tolist()}
        for j in np.flatnonzero(table["frequency"])])
    page.write(run.path)
    say(f"wrote {run.join('report.html')}")


def tell_table(page, table, labels, n, names):
    """Tell how many latents live, how strong they are, and the purest of each label; returns those
    to show, best first."""
    alive = np.flatnonzero(table["frequency"])
    counts = judge.threshold_counts(table["mean"])
    page.metrics.update(latents=len(table["mean"]), alive=len(alive))
    page.text(f"{len(alive)} of {len(table['mean'])} latents are active on {n} training samples")
    page.table(["mean activation at least", *(f"1e{t}" for t in counts)],
               [["latents", *counts.values()]], key="mean at least 10^t")
    if "entropy" not in table:
        return alive[np.argsort(-table["frequency"][alive], kind="stable")]
    entropy = table["entropy"][alive][np.isfinite(table["entropy"][alive])]
    page.metrics["mean entropy"] = float(entropy.mean()) if len(entropy) else None
    shown, columns = judge.purest(table, n, len(labels)), ("purity", "entropy", "frequency", "mean")
    page.text(f"mean label entropy {judge.fmt(page.metrics['mean entropy'])} nats of ln "
              f"{len(labels)} = {math.log(len(labels)):.3f}")
    page.table(["latent", "label", *columns],
               [[f"{j} {names.get(j, '')}", labels[table["label"][j]],
                 *(table[c][j] for c in columns)] for j in shown],
               "The purest latents of each label, active in 5 samples or more")
    return shown


def reference(coded, row, latent):
    """A sample that shows a latent, as HTML: its picture, with the patches where it is active."""
    image = coded.features.picture(row)
    if image is None or not coded.features.grid:
        return judge.describe_sample(coded.features, row, 120)
    patches = judge.weighted_patches(image, coded.heat(row, [latent])[0])
    return judge.embedded(image, 240) + judge.embedded(patches, 240)


def tell_barcodes(page, coded, mean, between):
    """Tell the barcodes of labels (CytoSAE Eq. 4), how well those of groups classify, and which
    latents differ; returns the arrays for a file. Without groups each sample is one, if it has
    tokens and there are some 20,000 at most; None where there is nothing to tell."""
    features, y = coded.features, coded.features.labels
    y, grouped = y if y is None or y.ndim == 1 else None, "groups" in features.about
    if between and (y is None or not grouped):
        lacking = "groups" if y is not None else "single label a sample"
        raise InputError(f"{coded.flags.data} has no {lacking} - --between compares patients: add "
                         "`groups` and `labels`")
    if y is None or not grouped and (coded.T == 1 or len(y) > 20000):
        return None
    groups, codes, label = judge.barcodes(coded.count, coded.groups, y)    # a_p of Eq. 4
    known, names = label >= 0, np.array(features.label_names)
    if not known.all():
        say(f"note: {(~known).sum()} of {len(label)} groups have no label, or several, and are "
            "left out")
    arrays = {"groups": groups, "labels": label, "barcodes": codes.toarray(), "label_names": names}
    codes, label = codes[known], label[known]
    there, n = np.unique(label, return_counts=True)
    arrays["diseases"] = means = judge.class_means(codes, label)           # a_d
    page.metrics["barcodes"] = found = {"groups": len(groups)}
    if len(there):
        page.picture("Barcodes", judge.latent_chart(
            dict(zip(names[there], means)), means.std(0), "mean count of active patches", 80))
    if len(there) > 1 and n.min() > 1:
        folds = data.stratified_parts(label, [1] * min(5, n.min()), coded.flags.seed)
        found["f1"] = judge.barcode_f1(codes, label, mean, folds)
        rows = [[f"1e{t}", v["latents"], judge.mean_std(v["f1"])] for t, v in found["f1"].items()]
        page.table(["mean activation at least", "latents", "weighted F1"], rows, "Logistic "
                   f"regression on barcodes: {len(label)} {'groups' if grouped else 'samples'}, "
                   f"{len(folds)} stratified folds")
    if between:
        pair = [label_number(features, name) for name in between.split(",")]
        if len(pair) != 2 or not np.isin(pair, there).all():
            raise InputError(f"--between {between} - give two labels that groups have, a,b")
        *chosen, difference = judge.differential(codes, label, *pair)
        found["differential"] = {names[c]: v.tolist() for c, v in zip(pair, chosen)}
        page.table(["more active in", "latents (difference of the mean count)"], [
            [names[c], " ".join(f"{j} ({difference[j]:+.2f})" for j in v[:10])]
            for c, v in zip(pair, chosen)])
    return arrays


PROMPT = """Below are samples that activate one latent of a sparse autoencoder strongly, samples \
that activate it moderately, and samples that do not. Name in at most five words what the first \
have in common and the last lack. Answer with the name alone."""


def write_prompts(coded, path, top):
    """For every latent the samples that show what it means, as JSON with a prompt for any language
    model. The prompt tells no label: a name must not copy its judge; a path may hold the label."""
    train, rng, out = coded.train, np.random.default_rng([coded.flags.seed, 10]), []
    code = coded.strength[train].tocsc()
    for j in np.flatnonzero(code.getnnz(axis=0)):
        column, told = code[:, [j]].toarray().ravel(), [PROMPT]
        shown = {kind: [{**coded.about(train[i]), "activation": float(column[i])} for i in rows]
                 for kind, rows in judge.shown_samples(column, top, rng).items()}
        for kind, samples in shown.items():
            words = [", ".join(f"{k} {v}" for k, v in one.items()
                               if k not in ("sample", "label", "image")) for one in samples]
            told.append(f"{kind}: {'; '.join(words)}")
        out.append({"latent": int(j), **shown, "prompt": "\n".join(told)})
    judge.write_json(path, out)
    say(f'wrote {path}: {len(out)} latents; collect the answers in a file like '
        '{"17": "round nucleus"} for --names')


def search(coded, names, flags):
    """Tell the samples that latents of fitting names find, and with --label how many are right,
    beside names shuffled."""
    if not names:
        raise InputError("--names is missing - a search needs the latents' names")
    if flags.embeddings:
        weights = judge.vector_weights(**read_embeddings(flags.embeddings, names))
    else:
        weights = judge.name_weights(flags.query, names)
    if not weights:
        raise InputError(f"no name fits '{flags.query}' - try other words, or --embeddings")
    found = judge.search(coded.strength, weights, coded.test)[:flags.top]
    best = sorted(weights.items(), key=lambda v: -v[1])[:10]
    print("latents: " + ", ".join(f"{j} '{names.get(j, '')}' {w:.2f}" for j, w in best))
    for row in found:
        print("  " + ", ".join(f"{k} {v}" for k, v in coded.about(row).items()))
    if flags.label is not None:
        y, _, rows = coded.told(flags.label)
        right, control = judge.search_precision(coded.strength, weights, rows, y, names, flags.top,
                                                coded.flags.seed)
        print(f"precision at {flags.top} for '{flags.label}': {right:.3f}; with names shuffled "
              f"{judge.mean_std(control)}; share of all samples {y[rows].mean():.3f}")


@command(f"{ON_RUN} stream label head-file rank iou other percentile connectivity strict box-score "
         "ap-points eval-rows=2000", "run")
def cmd_intervene(flags):
    """What latents do: with --label, keep or silence its top latents and see what a linear head
    still tells (Mammo-SAE); and how much few latents keep (the TotalSegmentator study)."""
    coded, of_label = Coded(flags.run, flags), {"rank", "iou", "other", "head_file"}
    for name in sorted(of_label & flags.given) if flags.label is None else ():
        raise InputError(f"--{name.replace('_', '-')} has no effect without --label - give one")
    label = None if flags.label is None else label_number(coded.features, flags.label)
    named = "" if label is None else re.sub(r"\W+", "_", "_" + coded.features.label_names[label])
    run = analysis_run(flags, f"intervene{named}")           # of a folder, as \w has it
    page = judge.Page(f"repsae intervene: {flags.label or 'all labels'}")
    y, train, test = coded.pool().told(flags.label)
    if label is not None:
        means = tell_interventions(page, coded, y > 0, train, test, flags)
        tell_places(page, coded, label, train, test, means, flags)
        tell_class_means(page, means, flags)
    tell_fidelity(page, coded, y, train, test, flags.eval_rows)
    page.write(run.begin().path)
    say(f"wrote {run.join('report.html')}")


def tell_interventions(page, coded, y, train, test, flags):
    """Tell what a linear head makes of features, of codes, and of their top latents alone or
    silenced (Mammo-SAE Eq. 3-4); returns the class means (2, L)."""
    w, bias = linear_head(coded, y, flags.head_file, train)
    W, b = coded.decoder()
    effect, base = W @ w, float(b @ w) + bias
    scores = {"original features": coded.dense[test] @ w + bias,
              "reconstructed": coded.strength[test] @ effect + base}
    rows = [[name, *judge.bootstrap_auc(y[test], score, coded.groups[test], seed=coded.flags.seed)]
            for name, score in scores.items()]
    page.table(["95 in 100 bootstrap draws", "AUC", "from", "to"], rows, key="auc")
    means = judge.class_means(coded.strength[train], y[train])
    ks = {0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, len(effect)}
    curve = judge.intervention(coded.strength[test], effect, base, y[test], means,
                               sorted(k for k in ks if k <= len(effect)))
    page.table(*judge.columns(curve), "AUC with only the k top latents of each class kept, or "
               "with these silenced", key="curve")
    page.picture("", judge.svg_lines(
        {what: [(i, c[what]) for i, c in enumerate(curve)] for what in ("keep", "silence")},
        "k of each class", "AUC on test samples", [str(c["k"]) for c in curve], zero=False))
    return means


def linear_head(coded, y, path, train):
    """Weights (d,) and bias of a linear score on normalised features: of a file, or fitted to the
    training samples' labels."""
    if not path:
        W, b = judge.logistic_fit(coded.dense[train], y[train].astype(int), 2)
        return W[:, 1] - W[:, 0], float(b[1] - b[0])         # of the log odds
    model, s = coded.model, coded.stream
    w, bias = data.read_head(path, model.dims[s])
    if "l2" in model.norm:
        raise InputError("the run scales samples to length 1, which a head for raw features cannot "
                         "follow - train it with --norm none or standard, or let intervene fit a "
                         "head")
    mean, std = (getattr(model, f"{v}_{s}").cpu().double().numpy() for v in ("mean", "std"))
    return w * std, bias + float(mean @ w)


def tell_places(page, coded, label, train, test, means, flags):
    """Tell where the top latents of a label fire: average precision of their heat maps as detectors
    of its boxes (Mammo-SAE Table 2), and the maps of six pictures."""
    features = coded.features
    top = np.argsort(-rank_of(coded, label, train, means, flags.rank), kind="stable")[:10]
    page.metrics["top latents"] = top.tolist()
    if features.boxes is not None and features.grid:
        found = judge.localisation(
            top, (coded.heat(row, top) for row in test), [coded.boxes(row, label) for row in test],
            flags.iou, flags.ap_points or None, percentile=flags.percentile, strict=flags.strict,
            connectivity=int(flags.connectivity), score=flags.box_score)
        page.table(*judge.columns(found), f"Average precision at IoU {flags.iou:g}",
                   key="localisation")
    elif features.boxes is not None:
        say("note: boxes but no token grid, so that no latent is localised - extract with --tokens")
    shown = [row for row in test if features.label_matrix([row])[0, label]][:6]
    images = {row: features.picture(row) for row in shown}
    if features.grid and None not in images.values():
        page.picture("The top latents over pictures with the label; true boxes in red", "".join(
            judge.heat_strip(image, coded.boxes(row, label), coded.heat(row, top))
            for row, image in images.items()))


def rank_of(coded, label, train, means, rank):
    """How much each latent belongs to a label (L,): by its class mean (Mammo-SAE section 2.2), by
    what that exceeds the other class's, or by its activity inside boxes (both ours)."""
    if rank != "boxes":
        return means[1] - means[0] * (rank == "difference")
    grid = coded.features.grid
    if grid is None or coded.features.boxes is None:
        raise InputError(f"{coded.flags.data} has no '{'boxes' if grid else 'grid'}' - write it "
                         "with extract --tokens from a Pascal VOC folder")
    inside = [judge.in_boxes(coded.boxes(row, label), grid) for row in train]
    return judge.contrast(coded.codes(train)[coded.stream], np.concatenate(inside))


def tell_class_means(page, means, flags):
    """Tell how far the class means of the latents are apart, here and in --other (Mammo-SAE
    Fig. 4)."""
    pairs = {"--data": means}
    if flags.other:
        theirs = flags.replaced({"data": flags.other})
        theirs.given = flags.given | {"data"}
        other = Coded(flags.run, theirs).pool()
        y, train, _ = other.told(flags.label)
        pairs["--other"] = judge.class_means(other.strength[train], y[train])
    page.table(*judge.columns([{"class means of": name, **judge.separation(v)}
                               for name, v in pairs.items()]), key="separation")
    for name, v in pairs.items():
        lines = {f"{name}, without the label": v[0], f"{name}, with it": v[1]}
        page.picture("", judge.latent_chart(lines, v.max(0), "mean activation"))


def tell_fidelity(page, coded, y, train, test, eval_rows):
    """Tell how well codes rebuild features, what few latents tell of classes y (N,), if there are
    any, and whether codes find the neighbours that features find."""
    seed, dense, (W, b) = coded.flags.seed, coded.dense.astype(np.float64), coded.decoder()
    r2 = judge.r2_both(dense[test], coded.strength[test] @ W + b)
    page.table(["of the features" + ", averaged over tokens" * (coded.T > 1), "R2"],
               list(r2.items()), "Reconstruction", key="r2")
    if y is not None:
        kept = judge.kept_performance(dense, coded.strength, y, train, test, seed=seed)
        page.table(*judge.columns(kept["rows"]), "Balanced accuracy of a linear probe on n latents",
                   key="few")
        page.table(["all", "balanced accuracy"], list(kept["all"].items()), key="probe")
    some = np.sort(np.random.default_rng([seed, 4]).permutation(test)[:eval_rows or None])
    near = judge.retrieval_fidelity(dense[some], coded.strength[some], y if y is None else y[some],
                                    coded.groups[some])
    if not near:
        return say(f"note: {len(some)} test samples have no ten neighbours of other groups")
    page.table(*judge.columns(near), "Neighbours of other groups", key="neighbours")


@command("data streams seed device json overwrite sparc", "run", "other")
def cmd_compare(flags):
    """Do two runs have latents in common? Best pairing by activation, against shuffled samples and
    a shared code."""
    path, streams = flags.json and out_file(flags, "json"), (flags.streams or "").split(",") * 2
    a, b = (Coded(run, flags, s).pool() for run, s in zip((flags.run, flags.other), streams))
    runs, rows, page = [a, b], a.test, judge.Page("repsae compare")
    if flags.sparc:
        if a.stream == b.stream:
            raise InputError(f"both runs are on '{a.stream}' - --sparc wants two streams")
        runs.append(Coded(flags.sparc, flags, f"{a.stream},{b.stream}"))
    for one in runs:
        if len(one.features) != len(a.features):
            raise InputError(f"{a.run} has {len(a.features)} samples, {one.run} has "
                             f"{len(one.features)} - compare runs on the same, or name a --data")
        rows = rows[np.all([one.features.has(s, rows) for s in one.features.streams], 0)]
    codes = {"the two runs, best pairing": (a.strength[rows], b.strength[rows])}
    for mode in ("joint", "alone") if flags.sparc else ():
        codes[f"SPARC {mode}, same latent"] = [
            judge.pool_tokens(code, runs[2].T)[0] for code in runs[2].codes(rows, mode).values()]
    found, shuffled = [], np.random.default_rng([a.flags.seed, 12]).permutation(len(rows))
    for name, (x, y) in codes.items():
        for what, z in ((name, y), (f"{name}, samples shuffled", y[shuffled])):
            r = judge.index_correlations(x, z) if "same" in name else judge.match_latents(x, z)[2]
            found.append({f"{len(rows)} samples": what, **judge.latents_in_common(r)})
    page.table(*judge.columns(found), key="shared")
    if path:
        judge.write_json(path, page.metrics["shared"])


def read_embeddings(path, names):
    """What any text model makes of names: {"query" (e,), "latents" (n,), "vectors" (n, e)}."""
    found, keys = data.read_arrays(path), ("query", "latents", "vectors")
    fits = {*keys} <= found.keys() and all(found[k].dtype.kind in "iuf" for k in keys)
    if not fits or found["vectors"].shape != (len(found["latents"]), *found["query"].shape) \
            or not np.isin(found["latents"], list(names)).all():
        raise InputError(f"{path} - give latents (n,) that --names names, vectors (n, e) of their "
                         "names, and query (e,), all of them numbers")
    return {k: found[k] for k in keys}


# ------------------------------------------------------------------------------------------------
# Images and words (thesis 5.3-5.4, A.3-A.4): tissue, a small CLIP, heat maps, retrieval
# ------------------------------------------------------------------------------------------------

@command("pictures size=64 seed=0 overwrite out=tissue")
def cmd_tissue(flags):
    """Draw microscope-like pictures whose cells, captions, masks and diseases are known."""
    run, made = Run(flags), data.tissue(flags.pictures, flags.size, flags.seed)
    files = data.tissue_files(made)
    write = {"png": lambda path, x: judge.save_picture(path, Image.fromarray(x)),
             "npz": judge.write_npz, "json": judge.write_json}
    for path, content in zip(run.begin().paths(list(files)), files.values()):
        write[path.rpartition(".")[2]](path, content)
    kinds = made["label_names"][:len(data.CELLS) + 1].tolist()
    rows = [np.flatnonzero(made["labels"][:, c])[:8] for c in range(len(kinds))]
    sheet = [[Image.fromarray(made["pixels"][i]) for i in some] for some in rows]
    judge.save_picture(run.path("sheet.png"), judge.contact_sheet(sheet, [""] * 8, 96, kinds))
    for name, n in zip(made["label_names"], made["labels"].sum(0)):
        print(f"{name}: in {n} pictures")
    for c, name in enumerate(made["disease_names"]):
        mine = made["disease"] == c
        parts = ", ".join(f"{(made['split'][mine] == part).sum()} {part}"
                          for part in ("train", "val", "test"))
        print(f"{name}: {len(np.unique(made['groups'][mine]))} patients, pictures: {parts}")
    say(f"wrote {run.join('tissue.npz')}, {flags.pictures} pictures, and sheet.png")


@command("images window weights merges size=64 patch=8 width layers joint context epochs=20 "
         "batch=128 lr=1e-3 seed=0 device overwrite out=runs/clip")
def cmd_clip(flags):
    """Train a small CLIP on pictures and captions (thesis 5.3.1), or import a released one."""
    if flags.weights:
        return import_clip(flags)
    images, captions, train, test = captioned(flags)
    words = data.Words(captions[train])
    if flags.merges:
        words = data.Merges(data.read_merges(flags.merges))
    run = Run(flags).begin(pictures=len(images), data_hash=images.hash)
    torch.manual_seed(flags.seed)
    rng, each = np.random.default_rng(flags.seed), len(train) // flags.batch
    layers = flags.width, flags.layers, max(flags.width // 32, 1)
    model = ssm.CLIP(flags.joint, layers, layers, words.size, flags.context, flags.patch,
                     flags.size).to(flags.device)
    view, n_steps = data.plain_view(flags.size, whole=True), flags.epochs * each
    pixels = torch.stack([view(images.open(i)) for i in range(len(images))])
    tokens = words(captions, flags.context, strict=False)
    order = np.stack([rng.permutation(train)[:each * flags.batch] for _ in range(flags.epochs)])
    rows, turns = order.reshape(n_steps, -1), rng.integers((4, 2), size=(n_steps, 2))
    progress, log = Progress(n_steps), Log(run.path("log.csv"))

    def batch(step):                                         # a field has no upright side
        x = torch.rot90(pixels[rows[step]], int(turns[step, 0]), (2, 3))
        return x.flip(3) if turns[step, 1] else x, tokens[rows[step]]

    def on_step(step, told):
        if step % 20 == 0 or step == n_steps:
            log.add({"step": step, **told})
        progress(step, lambda: f"loss {told['loss']:.3f}")
    ssm.fit_clip(model, batch, n_steps, flags.lr, on_step)
    log.write()
    write_clip(run, model, words)
    with torch.no_grad():
        seen = torch.cat([model.encode_image(x.to(flags.device)) for x in pixels[test].split(256)])
    said = ssm.text_features(model, words, captions[test])
    found = judge.retrieval({"image": seen.cpu().numpy(), "text": said.cpu().numpy()})
    page, part = judge.Page("repsae clip"), "test" if images.split is not None else "training"
    page.table([f"{len(test)} {part} pictures", *found["image -> text"]],
               [[pair, *v.values()] for pair, v in found.items()], key="test")
    page.metrics["loss"] = float(log.rows[-1]["loss"])
    page.write(run.path)


def captioned(flags):
    """(pictures, captions, rows to train on, rows to test on) of --images; raises InputError where
    `clip` cannot be trained on them."""
    images = pictures_of(flags)
    if "captions" not in images.about:
        raise InputError(f"{flags.images} has no captions - give an .npz with `images` and "
                         "`captions`")
    train, test = images.rows("train"), images.rows("test", "val")       # all, where none is split
    if len(train) < flags.batch or len(test) < 2:
        raise InputError(f"{len(train)} pictures to train on and {len(test)} to test - --batch "
                         f"{flags.batch} of the first are needed, and two of the second")
    if flags.patch > flags.size or flags.width % max(flags.width // 32, 1):
        raise InputError(f"--patch {flags.patch}, --size {flags.size}, --width {flags.width} - a "
                         "patch must fit the picture, and the width be a multiple of 32")
    return images, np.array([str(c) for c in images.about["captions"]]), train, test


def import_clip(flags):
    """A released CLIP as a run like our own: its weights, its tokenizer, and its first layer in our
    units of pixels."""
    words = data.Merges(data.read_merges(needed(flags, "merges")))
    with unpacked(flags.weights, "is no state_dict of a CLIP",
                  "of OpenAI's files save torch.jit.load(FILE).state_dict()") as state:
        model = ssm.clip_from_state(state)
    if words.size != model.config["vocab"]:
        raise InputError(f"{flags.merges} makes {words.size} tokens, {flags.weights} knows "
                         f"{model.config['vocab']} - give CLIP's bpe_simple_vocab_16e6.txt.gz")
    ssm.standardise_pixels(model.visual, *data.CLIP_PIXELS, data.IMAGENET)
    run = Run(flags).begin()
    write_clip(run, model, words)
    say(f"wrote {run.join('clip.pt')}")


def write_clip(run, model, words):
    kind = "merges" if isinstance(words, data.Merges) else "words"
    judge.write_torch(run.path("clip.pt"), {"model": model.state_dict(), "config": model.config,
                                            kind: words.words})


def load_clip(folder, device):
    """(image encoder, the side it was trained at) of a run of clip; the encoder's .clip and .words
    are the whole model and its tokenizer."""
    with unpacked(os.path.join(folder, "clip.pt"), "is no readable clip.pt",
                  "train it again") as kept:
        model = ssm.CLIP(**kept["config"])
        model.load_state_dict(kept["model"])
        words = data.Merges(kept["merges"]) if "merges" in kept else data.Words(words=kept["words"])
    model = model.eval().to(device)
    object.__setattr__(model.visual, "clip", model)          # no submodule: the other way round
    model.visual.words = words
    return model.visual, model.visual.size


@command(f"{ON_RUN} streams window images! weights! size label start-layer latent least most "
         "seed=0", "run?")
def cmd_explain(flags):
    """Heat maps of backbones by Grad-CAM (thesis 3.2.4); given a run of sparc, of its concepts.

    With a run: in pixels and words, and what they segment (5.4.4, A.3-A.4); --most is then 400."""
    if flags.run is not None:
        return explain_concepts(flags)
    run, images = Run(flags, flags.out or "runs/cam"), pictures_of(flags)
    rows = range(0, len(images), max(1, len(images) // flags.most))[:flags.most]
    pictures = [images.open(i) for i in rows]
    columns = {}
    for spec in flags.weights.split(","):
        name, model, trained = load_backbone(spec, flags, head=True)
        view = data.plain_view(flags.size or trained, whole=True)
        x = torch.stack([view(p) for p in pictures]).to(flags.device)
        with torch.no_grad():
            outputs = model(x[:1]).shape[1]
        wanted = flags.label
        if wanted is not None and not (wanted.isdecimal() and int(wanted) < outputs):
            raise InputError(f"--label {wanted}, but {name} has {outputs} outputs - give 0 to "
                             f"{outputs - 1}")
        score = None if wanted is None else lambda out: out[:, int(wanted)]
        heat = judge.grad_cam(model, *ssm.cam_layer(model, x), x, score)
        columns[name] = [judge.overlay(p, h) for p, h in zip(pictures, heat)]
    run.begin(data_hash=images.hash)
    for name, column in columns.items():
        for i, picture in zip(rows, column):
            stem = os.path.splitext(os.path.basename(images.paths[i]))[0]
            judge.save_picture(run.path(f"{name}_{i}_{stem}.png"), picture)
    sheet = judge.contact_sheet(list(zip(pictures, *columns.values())), ["picture", *columns])
    judge.save_picture(run.path("sheet.png"), sheet)
    print(f"wrote {len(rows) * len(columns)} heat maps and {run.join('sheet.png')}")


def explain_concepts(flags):
    """Point concepts of a SPARC run back at pixels and words, and measure what the maps segment."""
    run, seen = analysis_run(flags, "explain"), Concepts(flags)
    page, names = judge.Page("repsae explain: concepts in pixels and words"), seen.label_names
    maps = measured_maps(seen, page)
    drawn = seen.tell(page, "words", "Concepts of the labels", names, maps, seen.truth,
                      label_captions(seen), lambda z, c: z[:, seen.J[c]].sum(1), most=2)
    tell_latents(seen, page)
    tell_captions(seen, page)
    run.begin()
    arrays = {name: np.stack([found.get(key, np.full_like(next(iter(found.values())), np.nan))
                              for key in seen.truth]) for name, found in maps.items() if found}
    judge.write_npz(run.path("maps.npz"), {"keys": np.array(list(seen.truth)), **arrays})
    for (i, c, method), image in drawn.items():
        name = re.sub(r"[^\w-]+", "_", f"{i}_{names[c]}_{method}")
        judge.save_picture(run.path("overlays", f"{name}.png"), image)
    page.write(run.path)
    say(f"wrote {run.join('report.html')}")


class Concepts(Coded):
    """A run of sparc with the backbones that made its streams, and pictures with true masks.

    sees         {name: (backbone, its stream)} of --weights; `encoder`, CLIP's image encoder, with
                 its .clip and .words; `pictured` and `text`, its streams of pictures and captions
    J, alive     each label's latents (`judge.concept_latents`); each stream's, active in training
    truth        {(picture, label): bool mask} of the pictures `test`
    """

    def __init__(self, flags):
        super().__init__(flags.run, flags)
        self.images, truth = self._pictures()
        self.sees, self.encoder, self.pictured, self.text = {}, None, None, None
        for spec in flags.weights.split(","):
            self._see(*load_backbone(spec, self.flags)[:2])
        if self.text not in self.model.dims:
            raise InputError("no text encoder - name a run of clip in --weights, and have its text "
                             "stream in the sparc run")
        self.label_names, train = self.features.label_names, self.features.rows("train")
        labels, known = self.features.label_matrix(train), self.features.labelled[train]
        chose = self.codes(train, "alone" if self.model.topk == "local" else "joint")
        self.J = judge.concept_latents(chose, labels, flags.least, known)
        self.alive = {s: np.flatnonzero(code.getnnz(axis=0))
                      for s, code in self.codes(train, "alone").items()}
        self.chosen = chosen_latents(flags.latent, self.J, self.alive, self.model.n_latents)
        there, most = {i for i, _ in truth}, flags.most if "most" in flags.given else 400
        self.test = [i for i in self.features.rows("test", "val") if i in there][:most]
        self.truth = {key: m for key, m in truth.items() if key[0] in set(self.test)}
        if not self.truth:
            raise InputError(f"no test picture of {flags.images} has an object - there is nothing "
                             "to segment")

    def _pictures(self):
        """The pictures of --images and their true masks, once they fit the features and the run."""
        flags, features = self.flags, self.features
        images, arrays = pictures_of(flags), data.read_arrays(flags.images)
        shape = arrays["instances"].shape if {"instances", "boxes"} <= set(arrays) else ()
        if len(shape) != 3 or shape[0] != len(features):
            raise InputError(f"{flags.images} has no 'instances' and 'boxes' of these "
                             f"{len(features)} pictures - give what `tissue` wrote")
        lacking = [f"stream '{s}'" for s in self.model.streams if s not in features.streams]
        lacking += ["captions"] * ("captions" not in features.about)
        lacking += ["labels"] * (not features.label_names)
        if lacking:
            raise InputError(f"{flags.data} has no {lacking[0]} - explain needs captions, labels "
                             "and all streams of the run")
        width, height = images.open(0).size
        if shape[1:] != (height, width):
            raise InputError(f"{flags.images} has masks of {shape[1]}x{shape[2]} and pictures of "
                             f"{height}x{width} - give masks of the pictures' size")
        return images, data.true_masks(arrays)

    def _see(self, name, backbone):
        """Enter a backbone; one without attention under the name of what it gets instead."""
        depth, stream = len(judge.kept_attention(backbone)), name
        if hasattr(backbone, "clip"):
            if self.encoder is not None:
                raise InputError("two runs of clip in --weights - name one, whose words are meant")
            self.encoder, self.pictured, self.text = backbone, f"{name}_img", f"{name}_txt"
            depth = min(depth, len(judge.kept_attention(backbone.clip.transformer)))
            stream = self.pictured
        start = self.flags.start_layer
        if depth and not -depth <= start < depth:
            raise InputError(f"--set start-layer={start} - {name} has {depth} layers")
        if stream not in self.model.dims:
            raise InputError(f"the run has no stream '{stream}' - it has "
                             f"{', '.join(self.model.streams)}")
        self.sees[name if depth else f"{name} (Grad-CAM)"] = backbone, stream

    def code(self, stream, x):
        """Features (B, d) -> dense codes (B, L) of a stream alone."""
        return self.model.encode({stream: x}, "alone")[stream].dense(self.model.n_latents)

    def caption(self, i):
        return str(self.features.about["captions"][i])

    def read(self, captions):
        """Features (n, d) of captions."""
        return ssm.text_features(self.encoder.clip, self.encoder.words, captions)

    def maps(self, backbone, score, asked, block=64):
        """{(picture, label): heat map} of score(features, label) for pairs `asked`, and those of
        them whose score is 0."""
        view, out, silent = data.plain_view(getattr(backbone, "size", 224), True), {}, []
        cam_layer = functools.partial(ssm.cam_layer, backbone)
        for c in sorted({c for _, c in asked}):
            rows = [i for i, k in asked if k == c]
            for part in (rows[at:at + block] for at in range(0, len(rows), block)):
                x = torch.stack([view(self.images.open(i)) for i in part]).to(self.flags.device)
                heats, values = judge.heat_maps(backbone, x, lambda f: score(f, c), cam_layer,
                                                self.flags.start_layer)
                out.update({(i, c): heat for i, heat in zip(part, heats)})
                silent += [(i, c) for i, value in zip(part, values) if value == 0]
        return out, silent

    def tell(self, page, key, title, names, maps, there, asked, score, most=4):
        """On the page the maps of pairs `there`; and for {(picture, label): is it there?} what each
        word of the picture's caption adds to score(codes (1, L), label). Returns the overlays."""
        words = [{"concept": names[c], "caption": self.caption(i), "here": bool(here),
                  "words": judge.word_heat(self.encoder.clip, self.encoder.words, self.caption(i),
                                           lambda f: score(self.code(self.text, f), c),
                                           self.flags.start_layer)}
                 for (i, c), here in asked.items()]
        gallery, drawn = judge.map_gallery(maps, there, names, self.images.open, most)
        page.picture(title, gallery + judge.word_table(words) or "<p>No latent of a label is alive "
                     "in every stream; --latent names others.</p>")
        page.metrics[key] = words
        return drawn


def chosen_latents(text, J, alive, n_latents):
    """The latents of --latent; without it, of each label the first that is alive in every stream,
    three at most."""
    if text is None:
        shared = [functools.reduce(np.intersect1d, [mine, *alive.values()]) for mine in J]
        return sorted({int(v[0]) for v in shared if len(v)})[:3]
    try:
        chosen = [int(v) for v in text.split(",")]
    except ValueError:
        raise InputError(f"--latent {text} - give numbers, separated by commas")
    for j in chosen:
        if not any(j in v for v in alive.values()):
            wrong = "silent in every stream" if 0 <= j < n_latents else f"not one of {n_latents}"
            raise InputError(f"latent {j} is {wrong} - pick another")
    return chosen


def methods(seen):
    """{name: (backbone, score(features, label) -> (B,), labels that it can be asked for)}: the
    targets of Table 5.4 for each backbone, and CLIP's own similarity to a label's name."""
    out, unit = {}, torch.nn.functional.normalize
    for c in {c for _, c in seen.truth}:
        seen.encoder.words.pieces(seen.label_names[c])       # raises InputError for an unknown word
    prompts = seen.read(seen.label_names)
    with torch.no_grad():
        z_names = seen.code(seen.text, prompts)

    def together(stream, f, c):                              # picture and name choose the support
        both = seen.model.encode({stream: f, seen.text: prompts[c].expand(len(f), -1)}, "joint")
        return [both[s].dense(seen.model.n_latents) for s in (stream, seen.text)]
    for name, (backbone, s) in seen.sees.items():
        both = functools.partial(together, s) if seen.model.topk != "local" else None
        targets = judge.concept_scores(functools.partial(seen.code, s), z_names, seen.J,
                                       seen.alive[s], both, seen.flags.seed)
        out.update({f"{name}, {target}": (backbone, *how) for target, how in targets.items()})
    out[f"{seen.text[:-4]}, raw similarity"] = (
        seen.encoder, lambda f, c: unit(f, dim=1) @ unit(prompts[c], dim=0), range(len(prompts)))
    return out


def measured_maps(seen, page):
    """The maps of every method, {name: {(picture, label): (h, w)}}, and what they segment."""
    labels, maps, found = sorted({c for _, c in seen.truth}), {}, {}
    pairs = [(i, c) for i in seen.test for c in labels]      # there or not
    without = [seen.label_names[c] for c in labels if not len(seen.J[c])]
    if without:
        say(f"note: no latent of {', '.join(without)} - lower --least")
    for name, (backbone, score, possible) in methods(seen).items():
        asked = [pair for pair in pairs if pair[1] in possible]
        maps[name], silent = seen.maps(backbone, score, asked)
        drawn = [key for key in silent if maps[name][key].any()]
        found[name] = {**judge.map_scores(maps[name], asked, seen.truth, data.otsu),
                       "absent": len(silent), "maps of absent that are not 0": len(drawn)}
    middle = dict.fromkeys(pairs, judge.centre_prior())
    found["centre of the picture"] = judge.map_scores(middle, pairs, seen.truth, data.otsu)
    columns = ["AP", "AR", "mIoU", "AP small", "AP medium", "AP, all asked",
               "drawn though absent, %"]
    page.table([f"{len(seen.test)} pictures, {len(seen.truth)} masks", *columns],
               [[name, *(v[c] for c in columns)] for name, v in found.items()],
               "Segmentation by heat maps: of the labels that are there, as published, and of all")
    page.metrics["segmentation"] = found
    return maps


def label_captions(seen, most=2):
    """{(picture, label): is it there?}: for labels with latents, captions that name it, and one of
    a picture without it."""
    out, labels = {}, seen.features.label_matrix(seen.test)
    for c in sorted({c for _, c in seen.truth if len(seen.J[c])}):
        known = {(i, c): here for i, here in zip(seen.test, labels[:, c])
                 if seen.features.labelled[i]}
        named = [key for key in known if known[key] and seen.label_names[c] in seen.caption(key[0])]
        without = [key for key in known if not known[key]]
        out.update({key: known[key] for key in named[:most] + without[:1]})
    return out


def tell_latents(seen, page, most=4):
    """Single latents z_j (thesis Fig. 5.4) in the test samples where they are most active over all
    streams."""
    codes, asked = seen.codes(np.array(seen.test), "alone"), {}
    for j in seen.chosen:
        z = {s: code[:, [j]].toarray()[:, 0] for s, code in codes.items()}
        strength = sum(v / max(v.max(), 1e-12) for v in z.values())
        best = np.argsort(-strength, kind="stable")[:most]
        asked.update({(seen.test[n], j): z[seen.text][n] > 0 for n in best})
    names = {j: f"latent {j}" for j in seen.chosen}
    maps = {f"z, {name}": seen.maps(backbone, lambda f, j: seen.code(s, f)[:, j], asked)[0]
            for name, (backbone, s) in seen.sees.items()}
    seen.tell(page, "latents", "Single latents, where they are most active", names, maps, asked,
              asked, lambda z, j: z[:, j])


def tell_captions(seen, page, most=4):
    """Similarity of a picture to its own caption (thesis A.4.1), by z^s . z^t alone and by CLIP
    itself."""
    test, unit = seen.test[:most], torch.nn.functional.normalize
    asked = {(i, n): True for n, i in enumerate(test)}
    with torch.no_grad():
        f_text = seen.read([seen.caption(i) for i in test])
        f_image = seen.features.batch(test)[seen.pictured].to(f_text.device)
        z_text, z_image = seen.code(seen.text, f_text), seen.code(seen.pictured, f_image)
    maps = {f"z z', {name}": seen.maps(backbone, lambda f, n: seen.code(s, f) @ z_text[n], asked)[0]
            for name, (backbone, s) in seen.sees.items()}
    maps["cosine, CLIP itself"], _ = seen.maps(
        seen.encoder, lambda f, n: unit(f, dim=1) @ unit(f_text[n], dim=0), asked)
    seen.tell(page, "captions", "Pictures with their captions: similarity of the two",
              [f"picture {i}" for i in test], maps, asked, asked, lambda z, n: z @ z_image[n])


@command(f"{ON_RUN} streams sample from to query features encoder", "run")
def cmd_retrieve(flags):
    """Show what a sample of one stream finds in another: the ten nearest codes, joint and alone."""
    coded = Coded(flags.run, flags)
    model, features, flags = coded.model, coded.features, coded.flags
    source, target = flags["from"] or model.streams[0], flags.to or model.streams[-1]
    known = [s for s in model.streams if s in features.streams]
    for s in (source, target):
        if s not in known:
            raise InputError(f"no stream '{s}' - the run and its data have {', '.join(known)}")
    rows, page = features.rows("test", "val"), judge.Page("repsae retrieve")
    asked = flags.query is not None or flags.features        # by something from outside
    for s in {source, target} - ({source} if asked and source != target else set()):
        rows = rows[features.has(s, rows)]
    own = None if asked else flags.sample
    if own is not None and own >= len(rows):
        raise InputError(f"--sample {own} - give one of the {len(rows)} "
                         f"{features.split[rows[0]]} samples, from 0")
    run = analysis_run(flags, f"retrieve_{source}_{target}_{'given' if own is None else own}")

    def shown(i, stream):
        if stream.endswith("_txt") and "captions" in features.about:
            return html.escape(str(features.about["captions"][rows[i]]))
        return judge.describe_sample(features, rows[i])
    given, first = (None, shown(own, source)) if own is not None else \
        given_query(model, source, flags)
    for mode in ("joint", "alone") if own is not None else ("alone",):
        codes = coded.codes(rows, mode)
        query, partner = given if own is None else codes[source][[own]], ""
        if not query.nnz:
            page.text(f"{mode}: no latent is active in the query, so that nothing is near it")
            continue
        (near,), (similar,) = judge.nearest(query, codes[target], len(rows))
        if own is not None:
            rank = (similar >= similar[near == own]).sum()
            partner = f"the true partner has rank {rank} of {len(rows)}; "
        page.text(f"{mode}: {partner}nearest samples {rows[near[:10]].tolist()}")
        sheet = [f'<span style="outline:{3 * (i == own)}px solid #2f855a">{shown(i, target)}</span>'
                 for i in near[:10]]
        page.picture(f"{source} to {target}, {mode}", judge.strip(first, *sheet))
    page.write(run.begin().path)
    say(f"wrote {run.join('report.html')}")


def given_query(model, stream, flags):
    """The code (1, L) in `stream` of --query, read by the text encoder of --encoder, of the vector
    in --features, or of the row --sample of a feature file there; and how to show it, HTML."""
    if flags.query is not None:
        if not stream.endswith("_txt"):
            raise InputError(f"--query cannot ask in '{stream}' - name the text stream with --from")
        encoder, _ = load_clip(needed(flags, "encoder"), flags.device)
        if not encoder.words.pieces(flags.query):
            raise InputError("--query has no words - give some")
        x = ssm.text_features(encoder.clip, encoder.words, [flags.query])
        shown = html.escape(flags.query)
    elif flags.features.endswith(".npz"):
        others = data.read_features(flags.features, [stream])
        if flags.sample >= len(others):
            raise InputError(f"--sample {flags.sample}, but {flags.features} has {len(others)} "
                             "samples - count from 0")
        x = others.batch([flags.sample])[stream]
        shown = judge.describe_sample(others, flags.sample)
    else:
        x, shown = data.read_vector(flags.features)[None], html.escape(flags.features)
    if x.shape[1] != model.dims[stream]:
        raise InputError(f"the query has {x.shape[1]} numbers, stream '{stream}' has "
                         f"{model.dims[stream]} - name its stream with --from")
    with torch.no_grad():
        codes = model.encode({stream: x.to(flags.device)}, "alone")[stream]
    return judge.sparse_code(codes.indices.cpu().numpy(), codes.values.cpu().numpy(),
                             model.n_latents), shown


# ------------------------------------------------------------------------------------------------
# Slides and bags (thesis 3.2.2)
# ------------------------------------------------------------------------------------------------

@command("images voc window size step downsample threshold otsu smallest least-hole max-holes rois "
         "roi-share margin overwrite out=tiles")
def cmd_tile(flags):
    """Find the tissue of slides and lay tiles over it: for each slide a file of coordinates and an
    overview. With --voc, cut the annotated boxes of pictures out, into class folders by its splits.
    """
    window = grey_window(flags)
    if flags.voc:
        cuts, side = data.cut_boxes(flags.voc, flags.margin, window), flags.size or 64
        run, names = Run(flags).begin(), [f"{name}.png" for name in cuts.about["ids"]]
        run.paths(names)
        for i, name in enumerate(names):
            judge.save_picture(run.join(name), cuts.open(i).resize((side, side), Image.BICUBIC))
        count = collections.Counter(map(os.path.dirname, names))
        print("\n".join(f"{name}: {n}" for name, n in sorted(count.items())))
        return
    if not flags.images:
        raise InputError("--images is missing - name slides, or boxes of pictures with --voc")
    slides, size = data.read_slides(flags.images), flags.size or 224
    run = Run(flags, add=True)                               # slides may come one by one
    for note in slides.notes:
        say_once("note: " + note)
    if flags.rois and len(slides) > 1:
        raise InputError("--rois annotates one slide - name that slide with --images")
    regions = data.read_polygons(flags.rois) if flags.rois else None
    side, step = (round(v * flags.downsample) for v in (size, flags.step or size))
    how = {"least": flags.smallest, "least_hole": flags.least_hole, "max_holes": flags.max_holes,
           "threshold": None if flags.otsu else flags.threshold, "window": window}
    for i, name in enumerate(slides.about["groups"]):
        boxes, shown = data.tile_slide(slides.paths[i], side, step, **how)
        if not run.about:                                    # an unreadable slide leaves nothing
            run.begin()
        out = run.path(f"{name}.npz")
        arrays = data.tile_arrays(slides, i, boxes, out, regions, flags.roi_share)
        judge.write_npz(out, arrays)
        judge.save_picture(run.path(f"{name}.png"), shown)
        inside = f", {arrays['labels'].sum()} of them in the regions" if flags.rois else ""
        print(f"{out}: {len(boxes)} tiles of {side} pixels{inside}")


@command("data! stream head widths attention dropout squash instances bag-weight inst-loss "
         "subtyping epochs=200 patience=20 min-epochs batch=1 lr=2e-4 cosine weight-decay=1e-5 "
         "balanced folds votes seed=0 device overwrite out=runs/mil")
def cmd_mil(flags):
    """Multiple-instance learning: bags of instances to labels. Bags of a validation part stop the
    training early; where there is none, as in folds, all epochs are trained."""
    heads = flags.head.split(",")
    for head in heads:
        if head not in ssm.HEADS:
            raise InputError(f"--head {head} - take one or more of {', '.join(ssm.HEADS)}")
    make = {**flags.pick("attention dropout"), "widths": data.number_list(flags.widths),
            "squash": bool(flags.squash)}
    how = {**flags.pick("epochs lr weight_decay cosine bag_weight subtyping"), "k": flags.instances,
           "early": {"patience": flags.patience, "least": flags.min_epochs},
           "loss": torch.nn.functional.cross_entropy if flags.inst_loss == "ce"
           else ssm.smooth_top1_svm}
    bags = data.read_bags(flags.data, flags.stream)
    rounds = bags.rounds(flags.folds, flags.seed, flags.data)
    if not len(rounds[0][1]) and {"patience", "min_epochs"} & flags.given:
        say("note: no bags to validate by, so that --patience and --min-epochs have no effect")
    run = Run(flags).begin(bags=len(bags), rounds=len(rounds), data_hash=bags.hash)
    page, log, means, y = judge.Page("repsae mil"), Log(run.path("log.csv")), bags.means(), bags.y
    found = {"mean of the bag, logistic": [
        judge.scores(y[test], judge.logistic_probe(means[train], y[train], means[test],
                                                   len(bags.label_names), strength=0.01))
        for train, _, test in rounds]}
    progress = Progress(len(heads) * len(rounds))
    for head in heads:
        jobs = [(head, make, how, flags.batch, flags.balanced, [flags.seed, r], flags.votes, *parts,
                 flags.device) for r, parts in enumerate(rounds)]
        found[head] = []
        for scores, models in in_processes(mil_round, bags, jobs):
            found[head].append(scores)
            log.add({"head": head, "round": len(found[head]), **scores})
            progress(sum(map(len, found.values())) - len(rounds), lambda: head)
        log.write()
        if len(rounds) == 1:
            judge.write_torch(run.path(f"{head}.pt"), {
                "models": [model.state_dict() for model in models], "head": head,
                "dim": bags.X.shape[1], "label_names": bags.label_names, **make})
            if bags.coords and bags.images:
                page.picture(f"Attention of {head} over test slides",
                             attention_maps(bags, models, rounds[0][2], head, run))
    names = ("AUC", "accuracy", "F1")
    page.table(["head", *names], [[head, *(judge.mean_std([v[name] for v in scores])
                                           for name in names)] for head, scores in found.items()])
    page.text(f"{len(rounds)} test part{'s' * (len(rounds) > 1)} of about {len(rounds[0][2])} "
              "bags; mean ± standard deviation over them")
    page.write(run.path, found)
    say(f"wrote {run.join('report.html')}")


def mil_round(bags, head, make, how, batch, balanced, seed, votes, train, val, test, device="cpu"):
    """Scores, on bags `test`, of the mean vote of models that learn from bags `train`, each from
    its own weights, stopped by bags `val` if there are any; and the models. make: arguments of
    `ssm.MIL`; how: of `ssm.fit_mil`."""
    if not len(val):
        how = {**how, "early": None}
    models, p = [], 0

    def batches(rows, size=batch):
        return [[v.to(device) for v in part] for part in bags.batches(rows, size)]
    for i in range(votes):
        rng = np.random.default_rng([*seed, i])
        torch.manual_seed(int(rng.integers(2 ** 62)))
        model = ssm.MIL(bags.X.shape[1], len(bags.label_names), head, **make)
        for buffer, value in zip((model.mean, model.std), bags.scale(train)):
            buffer.copy_(value)
        ssm.fit_mil(model.to(device), lambda epoch: batches(bags.drawn(train, rng, balanced)),
                    batches(val), **how)
        with torch.no_grad():
            logits = torch.cat([model(x, mask)[0] for x, mask, _ in batches(test, 1)])
        p = p + logits.softmax(1).cpu().numpy() / votes
        models.append(model.cpu())
    return judge.scores(bags.y[test], p), models


SHARED = {}    # in a process among several: what all its jobs use


def in_processes(work, shared, jobs):
    """Yield work(shared, *job) of each job, in order; several by as many processes as cores."""
    if len(jobs) == 1:
        yield work(shared, *jobs[0])
        return
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(os.cpu_count(), context, begin_process,
                                     [work, shared]) as pool:
        try:
            yield from pool.map(do_job, jobs)
        except BaseException:                                # Ctrl-C: do not wait for them
            for process in multiprocessing.active_children():
                process.kill()
            raise


def begin_process(work, shared):
    """Begin one of several: it has one thread, since they share the cores, and ends with its
    parent, whatever ends that."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # which the parent answers for all
    SHARED.update(work=work, shared=shared)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def do_job(job):
    return SHARED["work"](SHARED["shared"], *job)


def attention_maps(bags, models, rows, head, run, most=6):
    """Test slides with each tile coloured by its share in the bag, as files
    heat_<label>_<slide>_<head>.png and as HTML."""
    shown = []
    for i in [i for i in rows if bags.coords[i] is not None and bags.images[i]][:most]:
        x, title = bags.padded([i])[0], f"{bags.names[i]}: {bags.label_names[bags.y[i]]}"
        with torch.no_grad():
            heat = sum(model.cpu()(x)[1].softmax(-1)[0].mean(0) for model in models).numpy()
        image, scale = data.Slide(bags.images[i]).overview(1024)
        picture = judge.box_overlay(image, bags.coords[i], heat, scale)
        name = f"heat_{bags.label_names[bags.y[i]]}_{bags.names[i]}_{head}.png"
        judge.save_picture(run.path(name), picture)
        shown.append(f"<h3>{html.escape(title)}</h3>"
                     + judge.strip(judge.embedded(image), judge.embedded(picture)))
    return "".join(shown) or "<p>The bags name no pictures.</p>"


# ------------------------------------------------------------------------------------------------
# Transfer learning (thesis 3.3)
# ------------------------------------------------------------------------------------------------

@command("images! label weights=vit_micro,vim_micro,vmamba_micro,resnet18 split runs size=224 "
         "patch frozen epochs=50 patience=10 batch=32 lr=1e-4 weight-decay=0.05 seed=0 window "
         "device overwrite out=runs/finetune")
def cmd_finetune(flags):
    """Fine-tune classifiers over several seeds, and test which is better than which."""
    pictures = data.read_pictures(flags.images, flags.size, flags.label, grey_window(flags))
    for note in pictures.notes:
        say_once("note: " + note)
    C, n = len(pictures.label_names), flags.runs
    specs = {try_classifier(spec, flags, C): spec for spec in flags.weights.split(",")}
    if len(specs) < len(flags.weights.split(",")):
        raise InputError(f"--weights {flags.weights} names a model twice - write "
                         "a=vit_micro:random,b=vit_micro:random")
    rounds = [data.picture_parts(pictures, flags.split, flags.seed + r, flags.images)
              for r in range(n)]
    run = Run(flags).begin(pictures=len(pictures.labels), data_hash=pictures.hash)
    log, progress, sizes = Log(run.path("log.csv")), Progress(len(specs) * n), {}
    pixels = pictures.pixels.transpose(0, 3, 1, 2)
    baseline = [judge.pixel_probe(pixels, pictures.labels, parts, C) for parts in rounds]
    found = {"pixels, logistic": baseline, **{name: [] for name in specs}}
    for i, (name, r) in enumerate([(name, r) for name in specs for r in range(n)], 1):
        one = flags.replaced({"seed": flags.seed + r})       # new weights and order each run
        model = load_backbone(specs[name], one, C)[1]
        scores, history = finetune_one(pictures, rounds[r], model, one)
        found[name].append(scores)
        for epoch, (loss, validation) in enumerate(history, 1):
            log.add({"model": name, "run": r + 1, "epoch": epoch, "loss": loss,
                     "validation": validation})
        log.write()
        progress(i, lambda: f"{name}, run {r + 1}: AUC {scores['AUC']:.3f}")
        if r == 0:                                           # the file that `explain` reads
            sizes[name] = sum(p.numel() for p in model.parameters())
            state = {"model": model.state_dict(), **model.made}
            judge.write_torch(run.path(f"{name}.pt"), state)
    page = judge.Page("repsae finetune")                     # thesis 3.3.3
    judge.tell_models(page, found, list(specs))
    page.write(run.path, {"parameters": sizes, "test pictures": len(rounds[0][2])})
    say(f"wrote {run.join('report.html')}")


def try_classifier(spec, flags, n_classes):
    """The name of a model; InputError if it does not classify a picture of zeros."""
    name, model, _ = load_backbone(spec, flags, n_classes)
    ssm.last_linear(model)                                   # refuses what ends in none
    x = torch.zeros(1, 3, flags.size, flags.size, device=flags.device)
    with contextlib.suppress(RuntimeError, AssertionError), torch.no_grad():
        out = model(x)
        if isinstance(out, torch.Tensor) and out.shape == (1, n_classes):
            return name
    raise InputError(f"{name} does not classify pictures of {flags.size} pixels - choose another "
                     "--size, or another model")


def finetune_one(pictures, parts, model, flags):
    """Train a classifier, stop by the validation loss, judge the best epoch on the test rows:
    (scores, history)."""
    torch.set_flush_denormal(True)
    torch.manual_seed(flags.seed)
    train, val, test = parts
    x, y = data.normalised(pictures.pixels), torch.from_numpy(pictures.labels)

    def batches(epoch):
        order = np.random.default_rng([flags.seed, epoch]).permutation(train)    # new each epoch
        for rows in torch.from_numpy(order).split(flags.batch):
            if len(rows) > 1 or flags.batch == 1:            # batch normalisation needs two
                yield data.jittered(x[rows]).to(flags.device), y[rows].to(flags.device)

    def plainly(rows):                                       # in order, unchanged
        for part in torch.from_numpy(rows).split(256):
            yield x[part].to(flags.device), y[part].to(flags.device)
    history = ssm.fit_classifier(model, batches, lambda: plainly(val), flags.epochs, flags.lr,
                                 flags.weight_decay, flags.patience, flags.frozen)
    with torch.no_grad():
        p = torch.cat([torch.softmax(model(x), 1) for x, _ in plainly(test)])
    return judge.scores(pictures.labels[test], p.cpu().numpy()), history


# ------------------------------------------------------------------------------------------------
# Commands that live in tests/
# ------------------------------------------------------------------------------------------------

def in_tests(name):
    """The module tests/`name`.py."""
    sys.modules.setdefault("repsae", sys.modules[__name__])  # it imports this one, no second
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests"))
    return importlib.import_module(name)


@command("seed=0 seeds quick out=demo")
def cmd_demo(flags):
    """The whole thesis on a laptop, on made-up tissue; tests/thesis.py says what is asked."""
    in_tests("thesis").demo(os.path.normpath(flags.out), flags.quick, flags.seed, flags.seeds)


@command("json svg device", "what")
def cmd_bench(flags):
    """Speed and memory: `sparc` (a step), `rows` (memory-mapped folders), `scan`, `backbones`."""
    for name in ("svg", "json"):
        if flags[name] and not os.path.isdir(os.path.dirname(flags[name]) or "."):
            raise InputError(f"--{name} {flags[name]}: no such folder - make it first")
    figures = in_tests("bench").run(flags.what, flags.device, flags.svg)
    if flags.json:
        judge.write_json(flags.json, figures)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------

class Flags(dict):
    """The settings of a command by name, readable as attributes; `given`: those that were typed."""
    given = frozenset()

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name)

    def pick(self, names):
        """Those of `names`, "lr batch", as keyword arguments."""
        return {name: self[name] for name in names.split()}

    def replaced(self, changes):
        new = Flags({**self, **changes})
        new.given = self.given
        return new


class Parser(argparse.ArgumentParser):
    """argparse, with our one line for its errors."""

    def error(self, message):
        message = re.sub("^argument (--[^ :]+): ", r"\1 ", message)
        hint = f" - see python repsae.py {' '.join(self.prog.split()[1:] + ['--help'])}"
        fail(message + hint * (" - " not in message))


def parse(argv):
    """argv -> (command function, Flags). Only what was typed comes out of argparse."""
    parser = Parser(prog="repsae", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    subs = parser.add_subparsers(dest="command", metavar="command", required=True,
                                 parser_class=Parser)
    for name, each in COMMANDS.items():
        add_command(subs, name, each)
    if any("\0" in word for word in argv or ()):
        fail("a NUL character on the command line - leave it out")
    given = vars(parser.parse_args(argv))
    each = COMMANDS[given["command"]]
    given |= typed_settings(" ".join(given.pop("set", [])), each.flags)
    values = {name.replace("-", "_"): default for name, default in each.flags.items()}
    flags = Flags({**values, **given})
    flags.given = frozenset(given) & frozenset(values)
    if not flags.get("resume"):                              # else the run may have them
        check_needed(flags)
    return each.run, flags


def check_needed(flags):
    """Raise InputError when a flag is missing that the command needs."""
    for name in sorted(COMMANDS[flags.command].needed):
        if not flags[name.replace("-", "_")]:
            raise InputError(f"--{name} is missing - see python repsae.py {flags.command} --help")


def add_command(subs, name, each):
    """A sub-command's parser, its help in groups."""
    about = inspect.cleandoc(each.run.__doc__)
    settings = [f"{flag}={default}  {SETTINGS[flag][2]}"
                for flag, default in each.flags.items() if flag in SETTINGS]
    sub = subs.add_parser(
        name, help=about.split("\n")[0], description=about,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings, for --set:\n  " + "\n  ".join(settings) if settings else None)
    for what in each.positional:
        if what == "run?":
            sub.add_argument("run", nargs="?", help="a run folder")
        elif what == "what":
            sub.add_argument(what, nargs="?", choices=BENCHES, default="all")
        else:
            sub.add_argument(what, help="a run folder")
    for title, table in GROUPS.items():
        group = sub.add_argument_group(title)
        names = [flag for flag in table if flag in each.flags or flag == "set" and settings]
        for flag in names:
            default, text = each.flags.get(flag), FLAGS[flag][2]
            kind = kind_of(flag, default)
            note = " (needed)" if flag in each.needed else \
                "" if default in (None, "auto") or kind is bool else f" (default: {default})"
            option = {"action": argparse.BooleanOptionalAction} if kind is bool else \
                {"choices": kind, "metavar": "|".join(kind)} if isinstance(kind, tuple) else \
                {"type": kind, "metavar": kind.__name__.split()[-1].upper(),
                 **({"action": "append"} if flag == "set" else {})}
            group.add_argument(f"--{flag}", default=argparse.SUPPRESS,
                               help=text.replace("%", "%%") + note, **option)


BENCHES = ("all", "sparc", "rows", "scan", "backbones")


def typed_settings(text, known):
    """--set "aux-k=32 clip=1" -> {"aux_k": 32, "clip": 1.}; fails on what the command lacks."""
    found = {}
    for word in text.split():
        name, _, value = word.partition("=")
        name = name.replace("_", "-")
        if name not in known or name not in SETTINGS:
            mine = ", ".join(n for n in known if n in SETTINGS) or "none"
            fail(f"--set {word}: no such setting - this command has {mine}")
        try:
            found[name.replace("-", "_")] = value_of(SETTINGS[name][1], value)
        except argparse.ArgumentTypeError as e:
            fail(f"--set {name}: {e}")
    return found


def check_device(flags):
    """Raise InputError unless torch can use --device."""
    try:
        torch.zeros(1, device=flags.device)
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0][:60]
        raise InputError(f"device '{flags.device}' cannot be used ({why}...) - try cpu")


def say(text):
    """A line for the user on stderr: results alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


@functools.cache
def say_once(text):
    """`say`, but the same line only once in a process."""
    say(text)


def fail(text):
    """End as every user error does: one line of at most 400 characters, exit code 2. Of a longer
    one the middle goes, since its end says what to do."""
    printable = "".join(c if c.isprintable() else " " for c in f"repsae: error: {text}")
    line = " ".join(printable.split())
    say(line if len(line) <= 400 else f"{line[:260]} ... {line[-130:]}")
    raise SystemExit(2)


def main(argv=None):
    """Run the command that argv names. What a user can mend ends in `fail`; bugs of ours do not."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")    # names of files need not be text
    try:
        run, flags = parse(argv)
        if "device" in flags:
            check_device(flags)
        run(flags)
    except Interrupted as e:
        say(f"\n{e}; go on with: python repsae.py {flags.command} --resume --out "
            f"{shlex.quote(flags.out)}")
        raise SystemExit(130)
    except KeyboardInterrupt:
        raise SystemExit(130)
    except MemoryError:
        fail("there is not enough memory for this - lower the sizes, or take fewer samples")
    except OSError as e:                                     # no space, no permission, no place
        where = e.filename or flags.get("out")
        fail(f"{e.strerror or e}: {where} - mend it, or name another place")
    except ValueError as e:
        if type(e).__name__ != "InputError":
            raise
        fail(e)
    finally:
        Run.release()


if __name__ == "__main__":
    main()
