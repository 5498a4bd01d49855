"""repsae: the command line. One function a sub-command; the only module that knows the others.

    python repsae.py sparc                      train and judge SPARC on made-up streams whose truth is known
    python repsae.py sparc --data feats.npz     the same on features of your own (data.py says how a file looks)
    python repsae.py --help                     all commands; `python repsae.py sparc --help` all settings

A run folder holds config.json, log.csv, checkpoint.pt, metrics.json and report.html, each written whole or not at all.
What a user can mend ends as one line on stderr and exit code 2. torch is imported late, so that --help is quick.
"""
import argparse
import contextlib
import csv
import fcntl
import functools
import glob
import html
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
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
# Every flag, once: name: (default, kind, help); a kind is a Number, str, bool or a tuple of choices.
# A command names those it takes, with its own default where it differs: "data lr=1e-3 images!".
# ------------------------------------------------------------------------------------------------

WHAT = {
    "data": (None, str, "features: an .npz or a folder of .npy; by default a run's own data, or "
             "made-up streams with a known truth. mil: bags"),
    "streams": (None, str, "names of the streams to use, a,b,c; all by default"),
    "stream": (None, str, "the one stream to use, where there are several"),
    "taxonomy": (None, str, 'JSON of the labels\' parents, {"child": "parent", "root": null} or '
                 'nested as in Open Images'),
    "images": (None, str, "pictures: a folder (of class, or of train, val and test folders), an "
               ".npz of MedMNIST's kind, or tissue.npz. tile: a slide or a folder of them"),
    "weights": (None, str, "models a,b,...: name=RUN of dino or clip, name=FILE.pt of finetune, "
                "name=arch:FILE, name=arch:random or an arch alone; name=lsa:N reads captions by "
                "runs of N words. clip: a file of released weights"),
    "label": (None, str, "the label in question, by name or number"),
    "window": (None, str, "low,high: grey values shown black and white (--window=-1000,400); else "
               "what a picture of more than 8 bits states or fills"),
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
    "embeddings": (None, str, ".npz with latents (n,), vectors (n, e), query (e,) of a text model"),
    "head-file": (None, str, ".npz with weight (d,) and bias () of a head; else one is fitted"),
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
    "skip": (None, str, "numbers of chapters of the demo to leave out, a,b"),
    "quick": (False, bool, "a size at which only the mechanics count, in minutes"),
}
MODEL = {
    "preset": (None, ("thesis", "mammo", "cyto"), "sparc: the thesis's settings for a million "
               "samples (5.3.2, A.1.2); sae: of thesis 4.1, Mammo-SAE or CytoSAE. What you type "
               "goes first"),
    "latents": ("auto", whole(1, 2 ** 24, auto=True), "L, width of the sparse code; auto: by the "
                "number of training rows, see `sae.settings_for`"),
    "k": ("auto", whole(1, auto=True), "latents kept per sample; auto: an eighth of L, 20 to 64"),
    "topk": ("global", ("global", "local", "both", "random"), "who chooses them in training: all "
             "streams together, each for itself, both ways with the losses added (ours), or one "
             "stream drawn anew each step (Universal SAE)"),
    "lam": (1., real(), "weight of cross reconstruction (thesis Eq. 14)"),
    "loss": ("sum", ("sum", "mean"), "over streams, as Eq. 14, or mean as the authors' code: "
             "lam_paper = lam_code / (M - 1)"),
    "norm": ("auto", ("auto", "l2", "standard", "standard,l2", "none"), "of the features: length 1 "
             "per sample, mean 0 and deviation 1 per dimension, or both in that order (auto)"),
    "dead-after": ("auto", whole(1, 10 ** 9, auto=True), "steps without firing after which a "
                   "latent is dead; auto: 1000, or a quarter of all steps if that is less"),
    "activation": ("topk", str, "relu with an L1 "
                   "penalty, k a sample, k a sample on average, learned thresholds with an L0 "
                   "penalty; all: every kind, in one table"),
    "sparsity": (None, real(), "lambda of L1 (relu: 0.1) or L0 (jumprelu: 0.01), for length 1"),
    "error": (None, ("nmse", "sum", "mean"), "squared error over ||x||^2 (topk, batchtopk), summed "
              "over d as the papers write, or its mean over d: lambda_paper = d * lambda_code"),
    "revive": (None, ("none", "auxk", "ghost", "resample"), "what is done about dead latents: auxk "
               "for topk and batchtopk, resample for relu and jumprelu"),
    "bias": ("zeros", ("zeros", "mean", "median"), "start of the decoder's bias"),
    "null": ("auto", bool, "train once more with rows of all streams but the first shuffled; auto: "
             "where that takes under about a minute"),
    "arch": ("vim_small", str, "backbone: a preset of ssm.py"),
    "patch": (None, whole(1, 2048), "patch size, where not the preset's"),
    "size": (224, whole(0, 8192), "side of the pictures, or of DINO's two global crops, in pixels; "
             "0 for the one trained at"),
    "width": (96, whole(1, 10 ** 5), "of both of CLIP's transformers"),
    "prototypes": (65536, whole(2), "K, outputs of DINO's head"),
    "head-hidden": (2048, whole(1, 10 ** 5), "width of DINO's head"),
    "head": ("gated", str, "of a bag: max, mean, abmil, gated, clam_sb, clam_mb; several: a,b"),
    "widths": ("512", str, "of the layers that embed an instance, a,b"),
    "attention": (256, whole(1, 10 ** 5), "hidden width of the attention"),
    "instances": (8, whole(1), "CLAM: instances called positive, and as many negative"),
    "dropout": (0.25, real(0., .99), "after the embedding; CLAM: in the attention too"),
    "frozen": (False, bool, "train the head alone"),
    "standardise": (False, bool, "random weights start in the pictures' own units instead of "
                    "ImageNet's (ours); for pale pictures"),
    "last": (4, whole(1, 1000), "ViT: class tokens of so many last blocks side by side"),
    "tokens": (False, bool, "patch tokens (N, T, d), in half precision, not the class token"),
    "whole": (False, bool, "squeeze pictures to a square instead of cutting their middle out"),
    "tau": (0., real(), "activation above which a patch counts (CytoSAE Eq. 3; barcodes: 0.2)"),
    "weighted": (False, bool, "entropy weighted by activation, as CytoSAE's code has it"),
    "rank": ("mean", ("mean", "difference", "boxes"), "latents of a label: by its mean activation "
             "(Mammo-SAE), by the difference to the rest, or inside its boxes (both ours)"),
    "iou": (0.25, real(1e-9, 1.), "overlap with a true box that makes a box right"),
    "solver": ("lbfgs", ("lbfgs", "sgd"), "of the linear probe: exact, or DINO's 20 epochs"),
    "downsample": (1., real(1e-9), "pixels of the slide in one of the tile's"),
    "threshold": (8, whole(0, 255), "saturation above which a pixel is tissue"),
    "otsu": (False, bool, "find that threshold by Otsu's method"),
    "smallest": (0.2, real(), "smallest piece of tissue, in areas of 512 x 512 pixels"),
}
TRAINING = {
    "epochs": ("auto", whole(1, auto=True), "passes over the training split (auto: 50, or what "
               "makes 1,000 steps); the most where training stops early"),
    "batch": ("auto", whole(1, auto=True), "samples a step; auto: a tenth of the rows, up to 256"),
    "lr": ("auto", real(TINY, 1e30, auto=True), "learning rate; auto: 2e-4 sqrt(2^14 / L). "
           "dino: at batch 256"),
    "warmup": (0, whole(), "over which the learning rate rises: steps; dino: epochs"),
    "weight-decay": (0., real(), "L2 penalty, or AdamW's decay; dino: at the start"),
    "shuffle": ("auto", ("auto", "blocks", "samples"), "shuffle single samples, or blocks of a "
                "batch's size; auto: blocks for memory-mapped folders"),
    "patience": (20, whole(1), "epochs without a better validation loss before training stops"),
    "min-epochs": (50, whole(), "epochs that are trained in any case"),
    "momentum": (0.996, PART, "of DINO's teacher at the start; 1 at the end"),
    "local-size": (96, SIDE, "side of DINO's local crops"),
    "local-crops": (8, whole(0, 100), "their number"),
    "local-scale": ("0.05,0.4", str, "share of the area that they cover, from,to"),
    "global-scale": ("0.4,1", str, "the same of global crops"),
    "blur": (2., real(0., 100.), "largest radius of the blur in pixels; less for small pictures"),
    "colour": (1., real(0., 2.), "strength of colour changes; less where colour matters"),
    "pathology": (False, bool, "vertical flips, right-angle turns, stain jitter too (ours)"),
    "balanced": (False, bool, "draw bags so that classes are equally frequent"),
    "inner": (1, whole(1, 1000), "models of a training part without a validation part: 1 is "
              "stopped by a fifth of it; n vote, each stopped by an n-th"),
    "refit": (False, bool, "the held-out bags only choose from --grid; then all bags train"),
    "grid": (None, str, 'values to choose from on held-out bags: "lr=1e-4,5e-4 dropout=0,0.5"'),
    "seed": (42, whole(0, 2 ** 32 - 1), "of everything drawn: split, weights, order, pictures"),
}
RUN = {
    "out": (None, str, "where to write; a folder inside the run by default"),
    "json": (None, str, "file for every figure"),
    "svg": (None, str, "file for the picture that `bench backbones` draws"),
    "device": ("cpu", str, "torch device"),
    "workers": (2, whole(0, 256), "processes that make crops"),
    "eval-rows": (10000, whole(0, 10 ** 9), "samples judged at the end, of the test (else val) "
                  "split; 0 for all. R@k depends on it"),
    "log-every": (20, whole(1), "steps between rows of log.csv"),
    "save-every": (60., real(), "seconds between checkpoints"),
    "overwrite": (False, bool, "replace what an earlier run wrote there, and nothing else"),
    "resume": (False, bool, "go on where the run there stopped, or start it"),
    "set": (None, str, 'settings that a reproduction needs, "name=value name=value": see below'),
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
CODE = "latents k norm dead-after aux-k aux-coef reinit-after select kernels"
KINDS = "sparsity error bias expansion bandwidth theta warmup"
STEPS = "epochs batch lr shuffle seed"
FOLDER = "device log-every save-every eval-rows overwrite resume"
ON_RUN = "data stream streams taxonomy seed device out overwrite"


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

    def __init__(self, flags, folder=None, resume=None):
        """`folder`: instead of --out; `resume`: instead of --resume. Changes nothing there yet."""
        self.folder = flags.out if folder is None else folder
        self.flags, self.saved, self.files, self.about = flags, None, [], {}
        resume = flags.get("resume") if resume is None else resume
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise InputError(f"{self.folder} is a file - name a folder with --out")
        if not os.path.isdir(self.folder) or not set(os.listdir(self.folder)) - {".lock"}:
            return
        if os.path.realpath(self.folder) in inputs_of(flags):
            raise InputError(f"{self.folder} is read by this command - name another --out")
        self._lock()
        if not resume and not flags.get("overwrite"):
            raise InputError(f"{self.folder} holds files already - use --overwrite" +
                             ", --resume" * ("resume" in flags) + " or another --out")
        if os.path.lexists(self.join("config.json")):
            config = read_config(self.folder)
            self.files = self._listed(config)
            if resume:
                self._go_on(config)

    def join(self, *parts):
        return os.path.join(self.folder, *parts)

    def _listed(self, config):
        files = config.get("files", [])
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
        self.saved = config
        threads = config.get("versions", {}).get("threads")
        if threads not in (None, torch.get_num_threads()):
            say_once(f"note: the run had {threads} threads, now {torch.get_num_threads()}: sums may "
                     "differ in their last digits")

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
        if not self.saved:
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
                      "versions": versions()}
        self._claim("config.json")
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

    def _claim(self, *names):
        for name in names:
            path = self.join(name)
            if not plain(name):
                raise InputError(f"{name!r} cannot be the name of a file - rename it")
            if name not in self.files and name != "config.json" and os.path.lexists(path) \
                    or os.path.islink(path) or not inside(path, self.folder):
                raise InputError(f"{path} was not written by this run - move it away, or name "
                                 "another --out")
            os.makedirs(os.path.dirname(path), exist_ok=True)
        new = [name for name in names if name not in self.files]
        if new:
            self.files += new
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


def inputs_of(flags):
    """The real paths of what exists of all that the flags name, but for outputs."""
    named = [piece for k, v in flags.items() if isinstance(v, str) and k not in OUTPUTS
             for piece in {v, *re.split("[,=:]", v)}]
    return {os.path.realpath(p) for p in named if p and os.path.exists(p)}


OUTPUTS = ("out", "json", "svg", "prompts", "command", "device")


def out_file(flags, name="out"):
    """The path in flags[name], once it is clear that a file may be written there: no file of the
    user's without --overwrite, no link, no input of this very command ever."""
    path = flags[name]
    real = os.path.realpath(path)
    if any(real == p or os.path.isdir(p) and real.startswith(p + os.sep) for p in inputs_of(flags)) \
            and os.path.exists(path):
        raise InputError(f"{path} is read by this command - name another --{name}")
    if os.path.islink(path) or os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is no plain file - name another --{name}")
    if os.path.exists(path) and not flags.overwrite:
        raise InputError(f"{path} exists - use --overwrite, or another --{name}")
    return path


def read_config(folder, names=()):
    """config.json of a run folder, a dict, whose "flags" have those of `names`, each of its kind."""
    path = os.path.join(folder, "config.json")
    config = data.read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("flags"), dict):
        raise InputError(f"{path} is no config of a run - restore it, or train anew elsewhere")
    check_kinds(config["flags"], {name: FLAGS[name][0] for name in names}, path)
    return config


def check_kinds(values, defaults, path):
    """Raise InputError unless what the file `path` holds could be typed for the flags in `defaults`."""
    for name, default in defaults.items():
        value, kind = values.get(name.replace("-", "_"), default), FLAGS[name][1]
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
    """What a .pt file holds, for the lines that take it apart: what fails there ends in one line."""
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
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "scipy": scipy.__version__, "threads": torch.get_num_threads()}


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
        layers |= THESIS
    layers = {**(PLANTED if flags.data is None else {}), **layers}
    if {"expansion", "latents"} <= flags.given:
        raise InputError(f"--set expansion={flags.expansion} and --latents {flags.latents} - give "
                         "one of the two")
    expansion = flags.get("expansion") or layers.get("expansion")
    if expansion:
        layers["latents"] = expansion * max(features.dims.values())
    flags = flags.replaced({k: v for k, v in layers.items() if k not in flags.given})
    typed = {k: flags[k] for k in ("latents", "k", "batch", "epochs") if flags[k] != "auto"}
    auto = sae.settings_for(n, **typed)
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
    """About how long training takes on two cores: all logits of a batch, M times the products."""
    logits, products = flags.batch * flags.latents, len(dims) * flags.batch * flags.k
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
        return sae.SPARC(features.dims, flags.latents, flags.k, flags.topk, flags.lam, flags.loss,
                         **shared)
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
    first = next(iter(codes.values())).indices
    fit["same_choice"] = float(np.mean([np.all(first == c.indices, 1) for c in codes.values()]))
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
    out["l0"] = float(np.mean([code.nnz / len(rows) for code in codes["alone"].values()]))
    if several:
        with torch.no_grad():
            seen = [{s: model.normalise(x.to(flags.device), s).cpu().numpy()
                     for s, x in features.batch(part).items()}
                    for part in (evaluation_rows(features, flags, "train"), rows)]
        raw = {s: x.numpy() for s, x in features.batch(rows).items()}
        out["linear_baseline"] = judge.linear_baseline(*seen)
        out["raw_retrieval"] = judge.retrieval(raw)
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


def judged_parts(run, trials, whole=None):
    """Train and judge each of `trials`, {name: (flags, features)}, in a folder of the run.

    Returns {name: metrics}, with the seconds that each took."""
    results = {}
    for name, (flags, features) in trials.items():
        say(f"-- {name}")
        began = time.time()
        results[name] = judged(run.part(name, flags), features, whole, quiet=True)
        results[name]["seconds"] = round(time.time() - began, 2)
    return results


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
    if len(features.per_token().rows("train")) < 2:
        raise InputError("the train split has 1 sample - give at least two to learn from")
    if features.tokens:
        say_once(f"note: {len(features)} samples of {features.tokens} tokens, and each token "
                 "counts as a sample")
    return features.per_token()


# ------------------------------------------------------------------------------------------------
# Sparse codes: training and using them (thesis 4.1, 5)
# ------------------------------------------------------------------------------------------------

@command(f"{DATA} {CODE} topk lam loss preset null {STEPS} {FOLDER} out=runs/sparc")
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
    if run.saved:                                            # what was typed then
        flags.given |= {k for k, v in flags.items()
                        if v != COMMANDS["sae"].flags.get(k.replace("_", "-"), v)}
    kinds = [{"activation": name} for name in sae.ACTIVATIONS]
    kinds[1:1] = [{"activation": "relu", "revive": how} for how in ("none", "ghost")]
    for kind in kinds:
        one = flags.replaced(kind)
        one.given = flags.given | kind.keys()
        one = resolved_sae(one, features)
        trials[f"{one.activation}_{one.revive}"] = one, features
    sae.make_optimiser(sae.SAE({"x": 2}, 2, k=1))            # what it loads is in no row's seconds
    run.begin(flags, data_hash=features.hash)
    results = judged_parts(run, trials)
    page = judge.Page("repsae sae: every activation")
    judge.tell_activations(page, results)
    page.write(run.path, results)
    say(f"wrote {run.join('report.html')}")


def load_run(folder, device="cpu"):
    """(model, config) of a run folder."""
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise InputError(f"{folder} is no run folder - name one that sparc, sae or ablate wrote")
    config = read_config(folder, ("data", "taxonomy", "seed"))
    return sae.load(os.path.join(folder, "checkpoint.pt"), device)[0], config


def features_for(model, config, flags):
    """(features, flags) to use a run on: of --data, else the run's own, of streams it knows."""
    flags = flags.replaced({k: config["flags"].get(k, flags.get(k))
                            for k in ("data", "taxonomy", "seed") if k not in flags.given})
    if not flags.streams:
        there = data.stream_names(flags.data) if flags.data else model.streams
        known = [s for s in model.streams if s in there]
        if not known:
            raise InputError(f"{flags.data} has {', '.join(there) or 'no streams'}, the run knows "
                             f"{', '.join(model.streams)} - check the keys")
        flags = flags.replaced({"streams": ",".join(known)})
    features = read(flags)
    for s, d in features.dims.items():
        if model.dims.get(s) != d:
            raise InputError(f"the run was trained on {model.dims}, the data has {features.dims} - "
                             "take streams that it knows")
    return features, flags


@command(f"{DATA} seed device eval-rows json overwrite", "run")
def cmd_eval(flags):
    """Measure a trained run again, on its own data or on other features of the same streams."""
    model, config = load_run(flags.run, flags.device)
    features, flags = features_for(model, config, flags)
    for s in model.streams:
        if s not in features.streams:
            raise InputError(f"the data lacks the run's stream '{s}' - "
                             f"eval needs {', '.join(model.streams)}")
    metrics, _, _ = measure(model, features, flags)
    judge.tell_summary(judge.Page(""), metrics)
    if flags.json:
        judge.write_json(out_file(flags, "json"), metrics)
        say(f"wrote {flags.json}")


@command(f"{DATA} seed device mode overwrite out=codes.npz", "run")
def cmd_encode(flags):
    """Write the sparse codes of features: <stream>_indices and _values, (N, k), or (N, T, k).

    Samples with fewer active latents may be filled up with index -1, value 0."""
    out_file(flags)
    model, config = load_run(flags.run, flags.device)
    features, _ = features_for(model, config, flags)
    flat = features.per_token()
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


@command(f"{DATA} over! {CODE} topk lam loss preset {STEPS} {FOLDER} out=runs/sweep")
def cmd_sweep(flags):
    """A run for every combination of settings, or of sets of streams, beside each other (thesis
    5.4.8, sparc.txt 5, B and C): --over "topk=global,local latents=256,512"."""
    run = Run(flags)
    axes = parse_axes("over", run.flags, "topk=global,local lam=0,1 (or streams=a+b,a+b+c)")
    results = swept(run, axes)
    page = judge.Page(f"repsae sweep over {' and '.join(axes)}")
    chart = judge.tell_sweep(page, results, axes)
    if chart:
        judge.write_text(run.path("sweep.svg"), judge.standalone_svg(chart))
    page.write(run.path, results)
    say(f"wrote {run.join('report.html')}; each run has its own in a folder beside it")


ABLATION = {"global_lam1", "global_lam0", "local_lam1", "local_lam0", "both_lam1", "random_lam1"}


@command(f"{DATA} {CODE} loss preset null {STEPS} {FOLDER} out=runs/ablate")
def cmd_ablate(flags):
    """The 2x2 of thesis 5.3.4 plus `both` and `random`, joint and alone, each with its null."""
    run = Run(flags)
    axes = {"topk": ["global", "local", "both", "random"], "lam": [1., 0.]}
    results = swept(run, axes, ABLATION, run)
    page = judge.Page("repsae ablate")
    judge.tell_ablation(page, results)
    page.write(run.path, results)
    say(f"wrote {run.join('report.html')}; each run has its own in a folder beside it")


def swept(run, axes, only=None, whole=None):
    """Train and judge every combination of the values in `axes`, or those named `only`. A name is
    made of the values: global_lam1. Returns {name: metrics}."""
    features, trials = read_to_train(run.flags, 2), {}
    flags = run.flags if run.saved else resolved(run.flags, features)
    for values in itertools.product(*axes.values()):
        one = dict(zip(axes, values))
        name = "_".join(v if isinstance(v, str) else f"{key}{v:g}" for key, v in one.items())
        if only and name not in only:
            continue
        trial, mine = flags.replaced(one), features
        if {"streams", "seed"} & one.keys():                 # the seed draws the split too
            trial["streams"] = (trial.streams or "").replace("+", ",")
            mine = read_to_train(trial, 2)
        sae.SPARC(mine.dims, trial.latents, trial.k)         # before anything is written
        trials[name] = trial, mine
    run.begin(flags, data_hash=features.hash)
    return judged_parts(run, trials, whole)


def parse_axes(option, flags, example):
    """The flag --over or --grid, "lr=1e-4,5e-4 k=2,4" -> {setting of the command: its values}."""
    axes, known = {}, {*MODEL, *TRAINING, *SETTINGS} & {*COMMANDS[flags.command].flags}
    for word in (flags[option] or "").split():
        name, _, values = word.partition("=")
        kind = FLAGS[name][1] if name in known else None
        if isinstance(kind, Number):                         # a value to compare is not "auto"
            kind = Number(kind.kind, kind.least, kind.most)
        elif name == "streams" and all(s for v in values.split(",") for s in v.split("+")):
            kind = str
        elif not isinstance(kind, tuple):
            raise InputError(f"--{option} {word} - write for example {example}")
        try:
            axes[name.replace("-", "_")] = [value_of(kind, v) for v in values.split(",")]
        except argparse.ArgumentTypeError as e:
            raise InputError(f"--{option} {word}: {e}")
    return axes


# ------------------------------------------------------------------------------------------------
# Backbones: DINO, features, probes (thesis 3.2)
# ------------------------------------------------------------------------------------------------

@command("images! window arch patch size=224 local-size local-crops global-scale local-scale blur "
         "colour pathology standardise prototypes head-hidden bottleneck norm-last teacher-temp "
         "teacher-temp-start teacher-warmup epochs=100 batch=512 lr=5e-4 warmup=10 min-lr "
         "weight-decay=0.04 weight-decay-end decay-ssm momentum clip freeze-last drop-path knn-every "
         "workers seed=0 device log-every save-every overwrite resume out=runs/dino")
def cmd_dino(flags):
    """Pre-train a backbone on pictures without labels (DINO, thesis 3.2.1); labels, if there, only watch over it (k-NN)."""
    run = Run(flags)
    flags, images = run.flags, pictures_of(run.flags)
    rows = images.rows("train") if images.split is not None else images.rows()
    if len(rows) < 2:
        raise InputError(f"{flags.images} has {len(rows)} picture to train on - give at least two")
    run.trained_on(images.hash, flags.images)
    train_dino(run, images, rows)


def pictures_of(flags):
    """The pictures that --images names, grey values as --window says."""
    images = data.read_images(flags.images)
    images.window = grey_window(flags)
    for note in images.notes:
        say_once("note: " + note)
    return images


def grey_window(flags):
    """--window "0,4095" -> (0.0, 4095.0), or None; raises InputError when it is no range."""
    if flags.window is None:
        return None
    try:
        low, high = map(float, flags.window.split(","))
        if -math.inf < low < high < math.inf:
            return low, high
    except ValueError:
        pass
    raise InputError(f"--window {flags.window} - give two grey values in order, for example 0,4095")


def needed(flags, name):
    """The value of a flag that has no default; raises InputError when it was not given."""
    if not flags[name]:
        raise InputError(f"--{name} is missing - see python repsae.py {flags.command} --help")
    return flags[name]


def number_pair(flags, name):
    """"0.4,1" -> (0.4, 1.0), shares of an image's area; raises InputError when it is not two of them in order."""
    try:
        low, high = map(float, flags[name].split(","))
        if 0 < low <= high <= 1:
            return low, high
    except ValueError:
        pass
    raise InputError(f"--{name.replace('_', '-')} {flags[name]} - give two shares of the area, for example 0.4,1")


def train_dino(run, images, rows):
    """Train, or go on training, the backbone of `flags` on the images `rows`, and report. Stops when it has collapsed."""
    flags = run.flags
    torch.set_flush_denormal(True)                           # gradients of far tokens get that small, and CPUs slow
    torch.manual_seed(flags.seed)
    student, teacher, optimiser = ssm.dino_nets(
        flags.arch, flags.size, flags.patch, flags.prototypes, flags.head_hidden, flags.bottleneck, flags.norm_last,
        flags.drop_path, flags.decay_ssm, flags.device)
    center = torch.zeros(flags.prototypes, device=flags.device)
    if flags.standardise:
        for net in (student, teacher):
            ssm.standardise_pixels(net, *data.pixel_statistics(images, rows), data.IMAGENET)
    crops = data.Crops(flags.size, flags.local_size, flags.local_crops, number_pair(flags, "global_scale"),
                       number_pair(flags, "local_scale"), flags.blur, flags.colour, flags.pathology)
    batches = data.Batches(rows, flags.batch, flags.seed, "samples", drop_last=True)
    epoch, step, most, checkpoint = batches.epoch, 0, 0., run.join("checkpoint.pt")
    n_steps = flags.epochs * epoch
    with torch.no_grad():                                    # sizes that do not fit fail here, before anything is written
        teacher([torch.zeros(1, 3, side, side, device=flags.device) for side in (flags.size, flags.local_size)])
    run.begin(flags, data_hash=images.hash, pictures=len(images))
    run.path("checkpoint.pt")
    if run.saved and os.path.exists(checkpoint):
        with unpacked(checkpoint, "is no checkpoint of this run", "train anew with --overwrite", flags.device) as kept:
            for thing, name in ((student, "student"), (teacher, "teacher"), (optimiser, "optimiser")):
                thing.load_state_dict(kept[name])
            center, step, most = kept["center"].float().reshape(center.shape), int(kept["step"]), float(kept["most"])
            if step < 0 or any(v.shape != weights.shape for weights, moments in optimiser.state.items()
                               for key, v in moments.items() if key != "step"):
                raise ValueError("moments of other weights")
    log = Log(run.path("log.csv"), step, *[("loss", "entropy", "information", "knn")] * 2)
    watch = Watch(images, teacher.backbone, flags)
    if not step and len(watch.test):
        log.add({"step": 0, "epoch": 0, "loss": "", "entropy": "", "information": "", "knn": watch.knn()})
        say(f"before training: k-NN {float(log.rows[0]['knn']):.3f} ({watch.measure}), raw pixels {watch.knn(raw=True):.3f}")

    def save():
        judge.write_torch(checkpoint, {"student": student.state_dict(), "teacher": teacher.state_dict(), "most": most,
                                       "optimiser": optimiser.state_dict(), "center": center, "step": step})
    views = data.crop_batches(images, crops, batches, flags.seed, step, n_steps, flags.workers)

    def on_step(t, told):
        nonlocal step, most
        step, most, ended = t, max(most, told["information"]), t % epoch == 0
        judged = ended and (t // epoch % flags.knn_every == 0 or t == n_steps)
        knn = watch.knn() if judged else None
        keep(t, lambda: {"epoch": round(t / epoch, 3), **told, "knn": "" if knn is None else knn},
             lambda: f"loss {told['loss']:.3f}  information {told['information']:.2f}"
                     f"{'' if knn is None else f'  k-NN {knn:.3f}'}", ended)
        if ended and most < COLLAPSED:
            raise InputError(collapse_message(told["entropy"], flags, t // epoch))
        most = 0. if ended else most
    schedule = {k: flags[k] for k in ("epochs", "min_lr", "warmup", "weight_decay", "weight_decay_end", "momentum",
                                      "teacher_temp", "teacher_temp_start", "teacher_warmup", "clip", "freeze_last")}
    with Keeper(flags, n_steps, step, log, save) as keep:
        ssm.fit_dino((student, teacher, center, optimiser), lambda t: next(views), n_steps, lambda t: ssm.dino_schedule(
            t, epoch, lr=flags.lr * flags.batch / 256, **schedule), on_step, step, flags.seed)
    finish_dino(run, log, watch)


COLLAPSED = 1e-3    # nats that the teacher's outputs tell of their images, at most, all through an epoch


def collapse_message(entropy, flags, epoch):
    """Which of the two collapses it was, by the entropy of the teacher's output, and what may help."""
    kind = "uniform" if entropy > 0.9 * math.log(flags.prototypes) else "constant"
    return (f"collapse: the teacher's output was {kind} for every picture all through epoch {epoch} (entropy {entropy:.3f} of "
            f"ln K = {math.log(flags.prototypes):.3f}) - lower --lr or --teacher-temp, or raise --batch or --warmup")


class Watch:
    """Looks at a backbone from outside: its features of the pictures, and their k-NN accuracy where there are labels."""

    def __init__(self, images, backbone, flags, most=4000):
        self.images, self.backbone, self.flags = images, backbone, flags
        self.train, self.test = np.arange(0), np.arange(0)
        labels = images.labels
        if labels is not None:
            self.train, self.test = (rows[images.labelled[rows]]
                                     for rows in images.knn_rows(flags.seed, most))
            self.tasks = judge.tasks_of(labels, self.train, self.test)
            self.measure = "balanced accuracy" if labels.ndim == 1 else "mean AUC of the labels"
            if not self.tasks or not len(self.train):
                self.test = np.arange(0)

    def features(self, rows, raw=False):
        backbone = None if raw else self.backbone
        return torch.cat(list(image_features(self.images, rows, backbone, self.flags.size, self.flags.device)))

    def knn(self, raw=False):
        """Of the 20 nearest neighbours the balanced accuracy, or, where several labels hold at once, their mean AUC; None
        without labels."""
        if not len(self.test):
            return None
        train, test = (self.features(rows, raw) for rows in (self.train, self.test))
        one = self.images.labels.ndim == 1
        C = len(self.images.label_names) if one else 2
        return judge.mean_of([judge.scores(y[self.test], judge.knn(train, y[self.train], test, (20,), n_classes=C)[20])
                        for y in self.tasks], "balanced accuracy" if one else "AUC")


def image_features(images, rows, backbone, size, device, block=256, whole=False, **how):
    """Yield features (b, d) of pictures block by block; without a backbone the pixels themselves. how: see `features`."""
    view, images.side = data.plain_view(size, whole or images.whole), max(size, images.side)
    for start in range(0, len(rows), block):
        x = torch.stack([view(images.open(i)) for i in rows[start:start + block]]).to(device)
        with torch.no_grad():
            out = x.flatten(1) if backbone is None else backbone.features(x, **how)
            yield out[0].cpu() if isinstance(out, tuple) else out.cpu()


def finish_dino(run, log, watch):
    """metrics.json and report.html, with curves.svg and neighbours.png: what some pictures' nearest neighbours look like."""
    number = {k: [(float(r["step"]), float(r[k])) for r in log.rows if r[k]]
              for k in ("loss", "entropy", "information", "knn")}
    found = {k: v[-1][1] for k, v in number.items() if v}
    charts = [judge.svg_lines({"loss": number["loss"]}, "step", "loss"),
              judge.svg_lines({k: number[k] for k in ("entropy", "information")}, "step", "the teacher's output, nats")]
    sections = [("Training", "".join(charts))]
    if number["knn"]:
        pixels = watch.knn(raw=True)
        found.update(knn_pixels=pixels, knn_random=number["knn"][0][1])
        line = [(x, pixels) for x, _ in number["knn"]]
        chart = judge.svg_lines({"teacher": number["knn"], "raw pixels": line}, "step", f"20-NN, {watch.measure}", zero=False)
        rows, labels = [], watch.images.labels[watch.test]
        labels = labels if labels.ndim == 1 else np.zeros(len(labels))                      # several at once: as they come
        for c in np.unique(labels):                          # the same number of each class
            rows.extend(watch.test[labels == c][:max(1, 12 // len(np.unique(labels)))])
        near, _ = judge.nearest(watch.features(rows), watch.features(watch.train), 7)
        charts.append(chart)
        pictures = [[watch.images.open(i) for i in (query, *watch.train[index])] for query, index in zip(rows, near)]
        judge.save_picture(run.path("neighbours.png"), judge.contact_sheet(
            pictures, ["picture", *(f"neighbour {i + 1}" for i in range(len(pictures[0]) - 1))], 96))
        sections += [("k-NN on held-out pictures", chart), ("Nearest neighbours in the training pictures", "".join(
            judge.strip(*(judge.embedded(p, 96) for p in row)) for row in pictures))]
    judge.write_json(run.path("metrics.json"), found)
    judge.write_text(run.path("curves.svg"), judge.standalone_svg(*charts))
    judge.write_report(run.path("report.html"), f"repsae dino: {run.flags.arch}", sections)
    print("  ".join(f"{k} {v:.3f}" for k, v in found.items()))
    say(f"wrote {run.join('report.html')}")


@command("images! weights! window size=0 standardise last tokens whole seed=0 device overwrite "
         "out=feats.npz")
def cmd_extract(flags):
    """Features of pictures by one or more backbones: an .npz of streams that `sparc` and `probe` read."""
    images, size = pictures_of(flags), flags.size
    out_file(flags)
    specs, streams = flags.weights.split(","), {}
    known = images.rows("train") if images.split is not None else images.rows()
    for spec in [spec for spec in specs if "=lsa:" in spec]:
        name, longest = spec.split("=lsa:")
        if "captions" not in images.about or flags.tokens or longest not in ("1", "2", "3"):
            raise InputError(f"{spec} - lsa:1 to lsa:3 (longest run of words) read captions, and have no tokens")
        streams[name] = data.latent_semantics(images.about["captions"], known, int(longest))
        say(f"{name}: {streams[name].shape}")
        specs.remove(spec)
    loaded = [load_backbone(spec, flags) for spec in specs]
    for spec, (_, model, _) in zip(specs, loaded):
        if flags.standardise and (spec.endswith(":random") or "=" not in spec):
            ssm.standardise_pixels(model, *data.pixel_statistics(images, known), data.IMAGENET)
    for name, model, trained in loaded:
        if hasattr(model, "clip"):                           # one run, two encoders
            if "captions" in images.about and not flags.tokens:
                streams[f"{name}_txt"] = ssm.text_features(
                    model.clip, model.words, images.about["captions"]).cpu().numpy()
            name = f"{name}_img"
        how = {"tokens": True} if flags.tokens else {"last": flags.last} if hasattr(model, "blocks") else {}
        whole, block = flags.whole or hasattr(model, "clip"), 16 if flags.tokens else 256  # clip learns from whole pictures
        parts = list(image_features(images, range(len(images)), model, size or trained, flags.device, block, whole, **how))
        streams[name] = np.concatenate([p.numpy() for p in parts])
        say(f"{name}: {streams[name].shape}")
    pixels = images.pixels
    about = {"images": relative(images.paths, flags.out) if pixels is None else pixels}
    if flags.tokens:
        about["grid"] = np.array(ssm.token_grid(loaded[0][1], size or loaded[0][2]))
        streams = {s: x.astype(np.float16) for s, x in streams.items()}
    if images.boxes is not None:
        about["coords"] = images.boxes
    if images.objects is not None:
        about.update(object_arrays(images.objects))
    if images.labels is not None:
        about.update(labels=images.labels, label_names=np.array(images.label_names))
    if images.mask is not None:
        about["mask"] = images.mask
    if images.split is not None:
        about["split"] = images.split
    judge.write_npz(flags.out, {**streams, **about, **images.about})
    say(f"wrote {flags.out}")


def object_arrays(objects):
    """The annotated objects of pictures as a feature file has them: labels (N, C) bool, label_names, boxes (n, 6)."""
    names = sorted({name for found in objects for name, _ in found})
    boxes = np.array([(i, names.index(name), *box) for i, found in enumerate(objects) for name, box in found
                      if box[0] < box[2] and box[1] < box[3]])
    labels = np.zeros((len(objects), len(names)), bool)
    labels[boxes[:, 0].astype(int), boxes[:, 1].astype(int)] = True
    return {"labels": labels, "label_names": np.array(names), "boxes": boxes}


def relative(paths, out):
    """Paths (N,) as they are seen from the folder of the file `out`."""
    return np.array([os.path.relpath(p, os.path.dirname(os.path.abspath(out))) for p in paths])


def load_backbone(spec, flags, n_classes=0, head=False):
    """name=RUN (of dino), name=FILE.pt (of finetune), name=arch:FILE, name=arch:random, or an arch alone, which is random.

    Returns (name, model, the side it was trained at); model.made tells how to build it again. With n_classes it gets a new
    head of so many classes, and arch may be one of torchvision's classifiers too; with `head` it keeps its file's.
    """
    name, _, where = spec.partition("=") if "=" in spec else (spec, "", f"{spec}:random")
    arch, _, path = where.partition(":")
    if not where or os.path.basename(name) != name:          # it names files, too
        raise InputError(f"{spec} - write name=RUN, name=arch:FILE or name=arch:random, separated by commas")
    made, size = {}, getattr(flags, "size", None) or None
    if not path and arch.endswith(".pt"):
        with unpacked(arch, "is no file of finetune", f"write {name}=arch:FILE for others") as kept:
            made, path = {k: kept[k] for k in ("arch", "size", "patch", "n_classes")}, arch
        check_kinds(made, {**dict.fromkeys(("size", "patch")), "arch": "vim_small"}, arch)
        if type(made["n_classes"]) is not int and made["n_classes"] is not None:
            raise InputError(f"{arch} has {made['n_classes']!r} as n_classes - train it anew")
    elif not path:
        if os.path.exists(os.path.join(arch, "clip.pt")):
            return (name, *load_clip(arch, flags.device))
        config = os.path.join(arch, "config.json")
        if not os.path.exists(config):
            raise InputError(f"{arch} is no dino run - give its folder, or write {name}=arch:FILE")
        made, path = read_config(arch, ("arch", "size", "patch"))["flags"], os.path.join(arch, "checkpoint.pt")
    arch = made.get("arch", arch)
    torch.manual_seed(flags.seed)
    if arch not in ssm.PRESETS and n_classes:
        model = torchvision_model(arch, path, n_classes).to(flags.device)
        model.made = {"arch": arch, "size": size, "patch": None, "n_classes": n_classes}
        return name, model, size
    settings = {"size": made.get("size", size if path == "random" else None),
                "patch": made.get("patch", getattr(flags, "patch", None))}
    model = ssm.make_backbone(arch, **settings, n_classes=made.get("n_classes") if head else None)
    if path != "random":
        ssm.load_weights(model, path)
    if n_classes:
        bare, model = model, ssm.make_backbone(arch, **settings, n_classes=n_classes)
        model.load_state_dict(bare.state_dict(), strict=False)                              # all but the head
    model.made = {"arch": arch, **settings, "n_classes": n_classes or made.get("n_classes")}
    return name, model.eval().to(flags.device), getattr(model, "size", 224)


def torchvision_model(name, path, n_classes):
    """A classifier of torchvision by name, its last layer new; path: a state_dict of the released shape, or "random"."""
    models = data.vision().models
    if name not in models.list_models(module=models):
        raise InputError(f"{name} is neither a preset of ssm.py nor a classifier of torchvision - try vit_micro, resnet18")
    model = models.get_model(name, num_classes=n_classes)
    if path != "random":
        with unpacked(path, f"does not hold the weights of {name}", "give torchvision's file") as state:
            own, last = model.state_dict(), ssm.last_linear(model)[0]
            model.load_state_dict({k: own[k] if k.rpartition(".")[0] == last else v for k, v in state.items()})
    return model


@command(f"{DATA} seed solver strength only json overwrite")
def cmd_probe(flags):
    """Linear probe and weighted k-NN on features: how well do they tell the labels apart (thesis 3.2.3)?"""
    features = read_to_train(flags)
    labels = features.labels
    if labels is None:                                       # tokens have none
        raise InputError(f"{flags.data or 'the made-up data'} has no labels, one or more a sample - add them as `labels`")
    chosen = list(range(len(features.label_names)))
    if flags.only:
        chosen = sorted({label_number(features, name) for name in flags.only.split(",")})
    several = labels.ndim == 2                               # may hold at once: each is found by itself
    known = np.flatnonzero(features.labelled & (several or np.isin(labels, chosen)))
    train, test = (np.intersect1d(features.rows(*s), known) for s in (("train",), ("test", "val")))
    tasks = judge.tasks_of(labels[:, chosen] if several else np.searchsorted(chosen, labels), train, test)
    if not len(test) or not tasks or len(np.unique(tasks[0][train])) < 2:
        raise InputError("the training split has fewer than two classes, or nothing is left to test on - mend `split` "
                         "or `labels`")
    unseen = [] if several else np.setdiff1d(labels[test], labels[train])
    for c in unseen[:1]:
        raise InputError(f"no training sample has the label '{features.label_names[c]}' of test "
                         "samples - mend `split`, or name the others with --only")
    if several and len(tasks) < len(chosen):
        say(f"note: {len(chosen) - len(tasks)} labels that all or none have, in training or in test, are left out")
    found, rows, C = {}, [], 2 if several else len(chosen)
    for s in features.streams:
        x = {part: features.batch(r)[s].numpy() for part, r in (("train", train), ("test", test))}
        each = []
        for y in tasks:
            if flags.solver == "lbfgs":
                linear = judge.logistic_probe(x["train"], y[train], x["test"], C, flags.strength)
            else:
                linear = judge.sgd_probe(x["train"], y[train], x["test"], C, seed=flags.seed)
            near = judge.knn(x["train"], y[train], x["test"], n_classes=C)
            ways = {"linear": linear, **{f"{k}-NN": v for k, v in near.items()}}
            each.append({way: judge.scores(y[test], p) for way, p in ways.items()})
        found[s] = {way: {key: judge.mean_of([one[way] for one in each], key) for key in each[0][way]} for way in each[0]}
        rows += [[f"{s}, {way}", *v.values()] for way, v in found[s].items()]
    print(judge.text_table(["", "accuracy", "balanced accuracy", "F1", "AUC"], rows))
    print(f"{len(train)} samples to learn from, {len(test)} to test on" + f"; mean over {len(tasks)} labels" * several)
    if flags.json:
        judge.write_json(out_file(flags, "json"), found)


# ------------------------------------------------------------------------------------------------
# What latents are and do: CytoSAE, Mammo-SAE, the TotalSegmentator study, thesis 4.3
# ------------------------------------------------------------------------------------------------

class Coded:
    """A run, the features it is used on, and the codes of every sample of one stream, computed alone.

    strength, count   CSR (N, L): mean activation over a sample's tokens, and number of its tokens above tau
    dense             (N, d): normalised features, the mean over tokens where there are any
    """

    def __init__(self, run, flags, tau=0.):
        self.model, config = load_run(run, flags.device)
        flags = flags.replaced({"streams": flags.get("stream") or flags.get("streams"), "taxonomy": None})
        flags.given |= {"taxonomy"}                          # not the run's: the labels may be others
        self.features, self.flags = features_for(self.model, config, flags)
        if len(self.features.streams) > 1:
            raise InputError(f"{run} has the streams {', '.join(self.features.streams)} - pick one with --stream")
        self.run, self.stream, self.T = run, next(iter(self.features.streams)), self.features.tokens or 1
        strength, count, dense, block = [], [], [], max(1, 4096 // self.T)
        for start in range(0, len(self.features), block):
            x = self.tokens(np.arange(start, min(start + block, len(self.features))))
            s, c = judge.pool_tokens(self.code(x), self.T, tau)
            strength.append(s)
            count.append(c)
            with torch.no_grad():
                dense.append(self.model.normalise(x, self.stream).unflatten(0, (-1, self.T)).mean(1).cpu().numpy())
        self.strength, self.count = sp.vstack(strength).tocsr(), sp.vstack(count).tocsr()
        self.dense = np.concatenate(dense)
        if not np.isfinite(self.strength.data).all():
            raise InputError(f"the codes of {run} are not finite - its training went wrong: lower --lr")
        if not self.strength.nnz:
            raise InputError(f"no latent of {run} is active on any sample - train it longer, or with less sparsity")

    def tokens(self, rows):
        """Raw vectors of samples (n,): (n * T, d)."""
        x = self.features.batch(rows)[self.stream].to(self.flags.device)
        return x.flatten(0, 1) if x.dim() == 3 else x

    def code(self, x):
        """Codes of raw vectors (n, d): CSR (n, L)."""
        with torch.no_grad():
            codes = self.model.encode({self.stream: x}, "alone")[self.stream]
        return judge.sparse_code(codes.indices.cpu().numpy(), codes.values.cpu().numpy(), self.model.n_latents)

    def heat(self, row, latents):
        """Activations of some latents over a sample's patches: (len(latents), rows, columns)."""
        grid = self.features.grid
        return self.code(self.tokens([row]))[:, latents].toarray().T.reshape(len(latents), *grid)

    def split(self):
        """(rows to learn from, rows to judge by)."""
        return self.features.rows("train"), self.features.rows("test", "val")

    def labels(self):
        """(N, C) bool; raises InputError when the file has no labels."""
        labels = self.features.label_matrix(np.arange(len(self.features)))
        if labels is None:
            raise InputError(f"{self.flags.data} has no labels - add them as `labels`")
        return labels

    def told(self, name):
        """(y (N,) bool: has a sample the label, rows to learn from, rows to judge by): labelled rows, both kinds in both."""
        y, label = self.labels(), label_number(self.features, name)
        known = self.features.labelled
        y, parts = y[:, label], [rows[known[rows]] for rows in self.split()]
        for part, rows in zip(("training", "test"), parts):
            if not 0 < y[rows].sum() < len(rows):
                raise InputError(f"{y[rows].sum()} of {len(rows)} labelled {part} samples have the label {name} - some, not "
                                 "all, must")
        return y, *parts

    def classes(self):
        """(N,) int, negative where unlabelled, or None where samples have no or several labels."""
        y = self.features.labels
        return y if y is not None and y.ndim == 1 and len(set(y[y >= 0].tolist())) > 1 else None

    def picture(self, row):
        """A sample's picture, or None when the file gives none or it cannot be read."""
        return self.features.picture(row)

    def about(self, row):
        """What the file tells of a sample, as a dict of text; no label where it is not known."""
        found = {key[:-1]: str(v[row]) for key, v in self.features.about.items() if v.ndim == 1}
        if self.features.labelled[row]:
            on = self.features.label_matrix([row])[0]
            names = [name for name, here in zip(self.features.label_names, on) if here]
            found["label"] = ", ".join(names) or "none"
        return {"sample": int(row), **found}


def label_number(features, label):
    """The number of a label given by name or number; raises InputError when there is none of it."""
    if label in features.label_names:
        return features.label_names.index(label)
    if label is not None and label.isdigit() and int(label) < len(features.label_names):
        return int(label)
    known = ", ".join(features.label_names[:20]) or "none: the file has no labels"
    raise InputError(f"no label '{label}' - take one of {known}")


@command(f"{ON_RUN} tau top weighted between", "run")
def cmd_latents(flags):
    """What each latent is: frequency, mean, label entropy, reference samples, barcodes of patients (CytoSAE)."""
    run = analysis_run(flags, "latents")
    coded = Coded(flags.run, flags, flags.tau)
    features, (train, _) = coded.features, coded.split()
    known = features.labelled[train]
    labels = features.label_matrix(train) if known.any() else None
    table = judge.latent_table(coded.strength[train], coded.count[train], labels, flags.top,
                               flags.weighted, known)
    counts = judge.threshold_counts(table["mean"])
    alive = table["frequency"] > 0
    found = {"latents": len(alive), "alive": int(alive.sum()), "mean at least 10^t": counts}
    print(f"{alive.sum()} of {len(alive)} latents are active on the {len(train)} training samples\n")
    print(judge.text_table(["mean activation at least", *(f"1e{t}" for t in counts)], [["latents", *counts.values()]]))
    scatter = judge.latent_scatter(table)
    sections = [("Latents by frequency and mean activation", scatter), ("Latents above a threshold of mean activation",
                judge.html_table(["at least", *(f"1e{t}" for t in counts)], [["latents", *counts.values()]]))]
    shown = np.flatnonzero(alive)[np.argsort(-table["frequency"][alive], kind="stable")]
    if labels is not None:
        there = table["entropy"][alive & np.isfinite(table["entropy"])]
        found["mean entropy"] = float(there.mean()) if len(there) else None
        clear = np.flatnonzero(table["frequency"] * len(train) >= 5)
        order = clear[np.lexsort((-table["frequency"][clear], table["entropy"][clear]))]
        each = max(1, 20 // max(len(features.label_names), 1))
        shown = [j for c in range(len(features.label_names)) for j in order[table["label"][order] == c][:each]][:20]
        columns = ["purity", "entropy", "frequency", "mean"]
        rows = [[f"{j}", features.label_names[table["label"][j]], *(table[c][j] for c in columns)] for j in shown]
        header = ["latent", "label", *columns]
        print(f"\nmean label entropy {judge.fmt(found['mean entropy'])} nats "
              f"of ln {len(features.label_names)} = "
              f"{math.log(len(features.label_names)):.3f}; the purest of each label, active in 5 samples or more:\n"
              + judge.text_table(header, rows))
        sections.append(("The purest latents of each label", judge.html_table(header, rows)))
    found["barcodes"], more, codes = barcode_sections(coded, table, flags)
    sections += more + [("Reference samples", reference_gallery(coded, table, train, shown[:24]))]
    run.begin()
    if codes is not None:
        judge.write_npz(run.path("barcodes.npz"), codes)
    judge.write_text(run.path("scatter.svg"), judge.standalone_svg(scatter))
    judge.write_json(run.path("latents.json"), [
        {"latent": int(j), **{k: none_if_nan(v[j]) for k, v in table.items() if k != "references"},
         "references": best_first(table["references"], j, train)} for j in np.flatnonzero(alive)])
    judge.write_json(run.path("metrics.json"), found)
    judge.write_report(run.path("report.html"), f"repsae latents: {os.path.basename(os.path.abspath(flags.run))}",
                       sections)
    say(f"wrote {run.join('report.html')}")


def analysis_run(flags, name):
    """The Run that an analysis of a run writes: --out, or the folder `name` inside that run."""
    if not plain(name) or "/" in name:
        raise InputError(f"{name!r} cannot be the name of a folder - name one with --out")
    return Run(flags, flags.out or os.path.join(flags.run, name))


def percent(share):
    """A share as a percentage, None as it is."""
    return None if share is None else 100 * share


def none_if_nan(v):
    """A number for JSON."""
    return None if v != v else v.item()


def best_first(ranks, latent, rows):
    """Samples that rank 1, 2, ... for a latent, from CSR ranks (L, n) over `rows`."""
    row = ranks[latent]
    return rows[row.indices[row.data.argsort()]].tolist()


def reference_gallery(coded, table, train, latents, most=6):
    """The reference samples of latents in HTML, with the patches where they are active, if there are pictures and a grid."""
    parts = []
    for j in latents:
        parts.append(f"<h3>latent {j}</h3>")
        shown = []
        for row in best_first(table["references"], j, train)[:most]:
            image = coded.picture(row)
            if image is None:
                shown.append(html.escape(", ".join(f"{k} {v}" for k, v in coded.about(row).items())))
            elif coded.features.grid:
                image.thumbnail((240, 240))
                shown.append(judge.embedded(image) + judge.embedded(judge.weighted_patches(image, coded.heat(row, [j])[0])))
            else:
                shown.append(judge.embedded(image, 120))
        parts.append('<div class="strip">' + "".join(f"<span>{v}</span>" for v in shown) + "</div>")
    return "".join(parts) or "<p>No latent is active in five samples.</p>"


def barcode_sections(coded, table, flags):
    """Barcodes of groups and of their labels (CytoSAE Eq. 4), what tells two labels apart, and how well barcodes classify:
    (figures or None, sections of the report, arrays for a file or None). Without groups each of some 20,000 samples at most is
    one, if it has tokens; groups whose labelled samples differ count for none of the labels."""
    features, y = coded.features, coded.classes()
    groups = features.about.get("groups")
    if flags.between and (groups is None or y is None):
        lacking = "groups" if y is not None else "single label a sample"
        raise InputError(f"{coded.flags.data} has no {lacking} - --between compares patients: add `groups` and `labels`")
    if y is None or groups is None and (coded.T == 1 or len(features) > 20000):
        return None, [], None
    groups = np.arange(len(features)) if groups is None else groups                         # a picture for itself
    names, codes, _ = judge.barcodes(coded.count, groups)
    of = [np.unique(y[rows][y[rows] >= 0]) for rows in np.split(np.argsort(groups, kind="stable"),
                                                  np.cumsum(np.unique(groups, return_counts=True)[1])[:-1])]
    y = np.array([found[0] if len(found) == 1 else -1 for found in of])
    known = np.flatnonzero(y >= 0)
    if len(known) < len(y):
        say(f"note: {len(y) - len(known)} of {len(y)} groups have no label, or several, and are left out")
    of_label = [c for c in np.unique(y[known])]
    arrays = {"groups": names, "labels": y, "barcodes": codes.toarray(), "label_names": np.array(features.label_names),
              "diseases": np.stack([np.asarray(codes[np.flatnonzero(y == c)].mean(0)).ravel() for c in of_label])
              if of_label else np.zeros((0, codes.shape[1]))}                               # a_p and a_d of Eq. 4
    out, sections = {"groups": len(names)}, [("Barcodes", barcode_chart(arrays, of_label))] if of_label else []
    codes, y = codes[known], y[known]
    rarest = np.bincount(y)[np.unique(y)].min() if len(y) else 0
    if rarest >= 2 and len(of_label) > 1:
        folds = data.stratified_parts(y, [1] * min(5, rarest), coded.flags.seed)
        f1 = judge.barcode_f1(codes, y, table["mean"], folds)
        header = ["mean activation at least", "latents", "weighted F1"]
        rows = [[f"1e{t}", v["latents"], judge.mean_std(v["f1"])] for t, v in f1.items()]
        unit = "groups" if "groups" in features.about else "samples"
        print(f"\n{len(y)} {unit}, {len(folds)} stratified folds, logistic regression on barcodes:\n"
              + judge.text_table(header, rows))
        out["f1"] = f1
        sections.append((f"Labels of {unit} from their barcodes", judge.html_table(header, rows)))
    if flags.between:
        pair = [label_number(features, name) for name in flags.between.split(",")]
        if len(pair) != 2 or not np.isin(pair, y).all():
            raise InputError(f"--between {flags.between} - give two labels that groups have, separated by a comma")
        first, second, difference = judge.differential(codes, y, *pair)
        rows = [[" ".join(f"{j} ({difference[j]:+.2f})" for j in chosen[:10])] for chosen in (first, second)]
        rows = [[features.label_names[c], *row] for c, row in zip(pair, rows)]
        print("\n" + judge.text_table(["more active in", "latents (difference of the mean count)"], rows))
        out["differential"] = {features.label_names[c]: chosen.tolist() for c, chosen in zip(pair, (first, second))}
        sections.append(("Latents that differ", judge.html_table(["more active in", "latents"], rows)))
    return out, sections, arrays


def barcode_chart(arrays, of_label, most=80):
    """The barcodes of the labels, a_d, over the latents in which they differ most, as a chart."""
    codes = arrays["diseases"]
    shown = np.sort(np.argsort(-codes.std(0), kind="stable")[:most])
    return judge.svg_lines({str(arrays["label_names"][c]): [(i, code[j]) for i, j in enumerate(shown)]
                            for c, code in zip(of_label, codes)}, f"the {len(shown)} latents that differ most, by number",
                           "mean count of active patches", [str(j) if i % 10 == 0 else "" for i, j in enumerate(shown)])


@command(f"{ON_RUN} label! head-file rank percentile iou connectivity strict box-score ap-points "
         "other", "run")
def cmd_intervene(flags):
    """What each latent does: keep or silence the top latents of a label and see what a linear head still tells (Mammo-SAE)."""
    run = analysis_run(flags, f"intervene_{flags.label}")
    coded = Coded(flags.run, flags)
    label = label_number(coded.features, flags.label)
    y, train, test = coded.told(flags.label)
    w, bias = linear_head(coded, y, train, flags)
    W, b = (v.detach().cpu().double().numpy() for v in (coded.model.W_dec[coded.stream], coded.model.b_pre[coded.stream]))
    effect, base, means = W @ w, float(b @ w) + bias, judge.class_means(coded.strength[train], y[train])
    groups = coded.features.about.get("groups")
    groups = None if groups is None else groups[test]
    intervals = {"original features": judge.bootstrap_auc(y[test], coded.dense[test] @ w + bias, groups,
                                                         seed=coded.flags.seed),
                 "reconstructed": judge.bootstrap_auc(y[test], coded.strength[test] @ effect + base, groups,
                                                      seed=coded.flags.seed)}
    ks = sorted({min(k, len(effect)) for k in (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, len(effect))})
    curve = judge.intervention(coded.strength[test], effect, base, y[test], means, ks)
    tables = [(["AUC, 95 in 100 bootstrap draws", "", "from", "to"], [[name, *v] for name, v in intervals.items()]),
              (["k of each class", "latents", "AUC, only these kept", "AUC, these silenced"],
               [[str(c["k"]), c["latents"], c["keep"], c["silence"]] for c in curve])]
    top = top_latents(coded, label, train, means, flags.rank)
    found = {"auc": intervals, "curve": curve, "top latents": top.tolist(), "separation": judge.separation(means)}
    chart = judge.svg_lines({what: [(i, c[what]) for i, c in enumerate(curve)] for what in ("keep", "silence")},
                            "k of each class", "AUC on test samples", [str(c["k"]) for c in curve], zero=False)
    if coded.features.boxes is not None and not coded.features.grid:
        say("note: boxes but no token grid, so that no latent is localised - extract with --tokens")
    if coded.features.boxes is not None and coded.features.grid:
        rows = localisation(coded, label, test, top, flags)
        found["localisation"] = rows
        tables.append((["latent", f"AP at IoU {flags.iou:g}", "by pictures with the label alone"],
                       [[f"{i + 1}: latent {row['latent']}", row["ap"], row["ap_present"]] for i, row in enumerate(rows)]))
    pairs = {"--data": means}
    if flags.other:
        second = flags.replaced({"data": flags.other})
        second.given = flags.given | {"data"}
        again = Coded(flags.run, second)
        z, rows, _ = again.told(flags.label)
        pairs["--other"] = judge.class_means(again.strength[rows], z[rows])
        found["separation of --other"] = judge.separation(pairs["--other"])
        tables.append((["class means", "distance", "cosine", "latent that differs most", "by"],
                       [[name, *judge.separation(v).values()] for name, v in pairs.items()]))
    for header, rows in tables:
        print(judge.text_table(header, rows) + "\n")
    run.begin()
    judge.write_json(run.path("metrics.json"), found)
    pictures = heat_gallery(coded, label, test, top)
    judge.write_report(run.path("report.html"), f"repsae intervene: {flags.label}", [
        ("What the top latents tell", chart + "".join(judge.html_table(*table) for table in tables)),
        ("Class means of the latents", "".join(class_mean_chart(name, v) for name, v in pairs.items())),
        *([("The top latents over pictures with the label; true boxes in red", pictures)] if pictures else [])])
    say(f"wrote {run.join('report.html')}")


def class_mean_chart(name, means, most=100):
    """Mammo-SAE Fig. 4: mean activation of the latents that are most active in either class, by latent, as a chart."""
    shown = np.sort(np.argsort(-means.max(0), kind="stable")[:most])
    return judge.svg_lines({f"{name}, {what}": [(i, means[c][j]) for i, j in enumerate(shown)]
                            for c, what in ((0, "without the label"), (1, "with it"))},
                           f"the {len(shown)} most active latents, by number", "mean activation", [
        str(j) if i % 10 == 0 else "" for i, j in enumerate(shown)])


def linear_head(coded, y, train, flags):
    """Weights (d,) and bias of a linear score on normalised features: of --head, or fitted to the training samples' labels."""
    model, s = coded.model, coded.stream
    if not flags.head_file:
        W, b = judge.logistic_fit(coded.dense[train], y[train].astype(int), 2)
        return W[:, 1] - W[:, 0], float(b[1] - b[0])
    arrays = data.read_arrays(flags.head_file)
    missing = [key for key in ("weight", "bias") if key not in arrays]
    if missing:
        raise InputError(f"{flags.head_file} lacks '{missing[0]}' - give weight (d,) or (2, d) and bias () or (2,)")
    numbers = [np.issubdtype(arrays[key].dtype, np.number) and np.isfinite(arrays[key]).all() for key in ("weight", "bias")]
    if not all(numbers):
        raise InputError(f"{flags.head_file} holds something else than finite numbers - mend it")
    w, b = (np.asarray(arrays[key], np.float64) for key in ("weight", "bias"))
    if w.ndim == 2 and len(w) == 2 and b.shape == (2,):
        w, b = w[1] - w[0], b[1] - b[0]
    if w.size != model.dims[s] or b.size != 1:
        raise InputError(f"{flags.head_file} has weight {w.shape} and bias {b.shape} - give ({model.dims[s]},) and (), or two rows "
                         "of both: one label against the rest")
    if "l2" in model.norm:
        raise InputError(f"the run scales samples to length 1, which a head for raw features cannot follow - train it with "
                         "--norm none or standard, or let intervene fit a head")
    mean, std = (getattr(model, f"{v}_{s}").cpu().double().numpy() for v in ("mean", "std"))
    w = w.reshape(-1)
    return w * std, float(b.reshape(-1)[0] + mean @ w)


def top_latents(coded, label, train, means, rank, most=10):
    """The latents of a label, best first: by its class mean (Mammo-SAE section 2.2), by how much that exceeds the other
    class's, or by how much more active they are inside its boxes on training pictures, in standard deviations (both ours)."""
    if rank != "boxes":
        return np.argsort(means[0] * (rank == "difference") - means[1], kind="stable")[:most]
    boxes, (rows, columns) = coded.features.boxes, grid_of(coded)
    y, x = ((np.arange(n) + 0.5) / n for n in (rows, columns))
    sums = np.zeros((3, coded.model.n_latents))              # of activations inside, outside, of squares
    n = np.zeros(2)
    for row in train:
        inside = np.zeros((rows, columns), bool)
        for _, _, x0, y0, x1, y1 in boxes[(boxes[:, 0] == row) & (boxes[:, 1] == label)]:
            inside |= ((y0 <= y) & (y < y1))[:, None] & ((x0 <= x) & (x < x1))
        code, inside = coded.code(coded.tokens([row])), inside.ravel()
        for i, part in enumerate((inside, ~inside)):
            sums[i] += np.asarray(code[np.flatnonzero(part)].sum(0)).ravel()
            n[i] += part.sum()
        sums[2] += np.asarray(code.multiply(code).sum(0)).ravel()
    spread = np.sqrt(np.maximum(sums[2] / n.sum() - ((sums[0] + sums[1]) / n.sum()) ** 2, 0))
    return np.argsort(-(sums[0] / max(n[0], 1) - sums[1] / max(n[1], 1)) / np.maximum(spread, 1e-12), kind="stable")[:most]


def grid_of(coded):
    """(rows, columns) of the tokens; raises InputError when the features have none, or no boxes."""
    if coded.features.grid is None or coded.features.boxes is None:
        lacking = "boxes" if coded.features.grid else "grid"
        raise InputError(f"{coded.flags.data} has no '{lacking}' - write it with extract --tokens from a Pascal VOC folder")
    return coded.features.grid


def localisation(coded, label, rows, latents, flags):
    """Average precision of each latent's heat maps as a detector of a label's boxes (Mammo-SAE Table 2)."""
    boxes = coded.features.boxes
    truth = [[tuple(b[2:]) for b in boxes[(boxes[:, 0] == row) & (boxes[:, 1] == label)]] for row in rows]
    how = {"percentile": flags.percentile, "connectivity": int(flags.connectivity), "strict": flags.strict,
           "score": flags.box_score}
    found = [[judge.heat_boxes(heat, **how) for heat in coded.heat(row, latents)] for row in rows]
    out, iou = [], (flags.iou, flags.ap_points or None)
    for i, j in enumerate(latents):
        mine = [f[i] for f in found]
        there = [(f, t) for f, t in zip(mine, truth) if t]
        out.append({"latent": int(j), "ap": judge.average_precision(mine, truth, *iou),
                    "ap_present": judge.average_precision(*zip(*there), *iou) if there else None})
    return out


def heat_gallery(coded, label, rows, latents, most=6):
    """Pictures with a label, true boxes in red, beside the heat maps of latents, as HTML."""
    y, parts = coded.labels()[:, label], []
    for row in [row for row in rows if y[row]][:most]:
        image = coded.picture(row)
        if image is None or not coded.features.grid:
            return ""
        image.thumbnail((150, 150))
        draw = ImageDraw.Draw(image)
        boxes = coded.features.boxes if coded.features.boxes is not None else ()
        for b in [b for b in boxes if b[0] == row and b[1] == label]:
            draw.rectangle([v * side for v, side in zip(b[2:], image.size * 2)], outline="red", width=2)
        heats = coded.heat(row, latents)
        parts.append(judge.strip(judge.embedded(image), *(
            judge.embedded(judge.overlay(image, h / max(h.max(), 1e-9))) for h in heats)))
    return f"<p>Latents {', '.join(map(str, latents))}.</p>" + "".join(parts)


@command(f"{ON_RUN} label eval-rows=2000", "run")
def cmd_fidelity(flags):
    """How much of the features a code keeps: R2, what few latents can tell, neighbours (the TotalSegmentator study)."""
    run = analysis_run(flags, "fidelity")
    coded = Coded(flags.run, flags)
    y, (train, test) = coded.classes(), coded.split()
    if flags.label is not None:                              # one against the rest
        y, train, test = coded.told(flags.label)
        y = y.astype(int)
    elif y is not None:                                      # what has no label is left out
        train, test = train[y[train] >= 0], test[y[test] >= 0]
        if len(np.unique(y[train])) < 2 or not np.isin(np.unique(y[test]), y[train]).all():
            raise InputError("the training split has fewer than two classes, or a test class is not in it - mend `split`")
    model, s = coded.model, coded.stream
    W, b = (v.detach().cpu().numpy() for v in (model.W_dec[s], model.b_pre[s]))
    r2 = judge.r2_both(coded.dense[test].astype(np.float64), coded.strength[test] @ W + b)
    kept = None
    if y is not None:
        kept = judge.kept_performance(coded.dense.astype(np.float64), coded.strength, y, train, test, seed=coded.flags.seed)
    groups = coded.features.about.get("groups")
    some = np.sort(np.random.default_rng([coded.flags.seed, 4]).permutation(test)[:flags.eval_rows or None])
    if len(some) <= 10:
        raise InputError(f"{len(some)} test samples - neighbours at 10 need more than ten")
    near = judge.retrieval_fidelity(coded.dense[some], coded.strength[some], None if y is None else y[some],
                                    None if groups is None else groups[some])
    print("R2 of the features" + (", averaged over tokens" if coded.T > 1 else "") + ": "
          + ", ".join(f"{k} {judge.fmt(v)}" for k, v in r2.items()))
    tables = []
    if kept:
        tables.append(("What few latents tell", ["balanced accuracy of a linear probe", "best latents", "random latents",
                                                 "principal components", "kept, %"],
                       [[f"{row['n']}", row["best latents"], row["random latents"], row["principal components"],
                         percent(row["kept"])] for row in kept["rows"]]
                       + [["all latents", kept["all latents"], None, None, None],
                          [f"all {coded.dense.shape[1]} features", kept["dense"], None, None, None]]))
    if near:
        tables.append(("Neighbours, samples of the same group left out", list(near[0]),
                       [[str(row["k"]), *list(row.values())[1:]] for row in near]))
    for _, header, rows in tables:
        print("\n" + judge.text_table(header, rows))
    run.begin()
    judge.write_json(run.path("metrics.json"), {"r2": r2, "kept": kept, "neighbours": near})
    judge.write_report(run.path("report.html"), "repsae fidelity", [
        ("Reconstruction", judge.html_table(["R2", ""], [[k, v] for k, v in r2.items()])),
        *((title, judge.html_table(header, rows)) for title, header, rows in tables)])
    say(f"wrote {run.join('report.html')}")


PROMPT = ("Below are samples that activate one latent of a sparse autoencoder strongly, samples that activate it moderately, "
          "and samples that do not. Name in at most five words what the first have in common and the last lack. Answer with "
          "the name alone.")


@command(f"{ON_RUN} top=8", "run")
def cmd_describe(flags):
    """For every latent the samples that show what it means, as JSON with a prompt for any language model."""
    coded = Coded(flags.run, flags)
    train, _ = coded.split()
    code, rng, out = coded.strength[train].tocsc(), np.random.default_rng([coded.flags.seed, 10]), []
    untold = ("sample", "label", "image")                    # a name must not copy its judge; a path may hold the label
    for j in np.flatnonzero(code.getnnz(axis=0)):
        column = slice(code.indptr[j], code.indptr[j + 1])
        active = train[code.indices[column][np.argsort(-code.data[column], kind="stable")]]
        middle = len(active) // 2
        drawn = rng.choice(train, min(len(train), 50 * flags.top), replace=False)
        silent = drawn[~np.isin(drawn, active)][:flags.top]
        groups = {"top": active[:flags.top], "middling": active[max(flags.top, middle - flags.top // 2):][:flags.top],
                  "inactive": silent}
        shown = {name: [{**coded.about(row), "activation": float(coded.strength[row, j])} for row in rows]
                 for name, rows in groups.items()}
        told = "\n".join(f"{name}: " + "; ".join(
            ", ".join(f"{k} {v}" for k, v in one.items() if k not in untold) for one in rows)
            for name, rows in shown.items())
        out.append({"latent": int(j), **shown, "prompt": f"{PROMPT}\n{told}"})
    path = out_file(flags)
    judge.write_json(path, out)
    say(f'wrote {path}: {len(out)} latents; collect the answers in a file like {{"17": "round nucleus"}} for search --names')


def read_names(path, n_latents):
    """names.json: dict latent -> name."""
    found = data.read_json(path)
    if not isinstance(found, dict) or not all(re.fullmatch(r"\d{1,9}", k) for k in found):
        raise InputError(f'{path} is no file of names - write {{"17": "round nucleus"}}')
    names = {int(k): str(v) for k, v in found.items()}
    wrong = [j for j in names if not 0 <= j < n_latents]
    if wrong or not names:
        raise InputError(f"{path}: latent {wrong[0] if wrong else '-'} is not among the run's {n_latents} - mend the names")
    return names


@command(f"{ON_RUN} names query embeddings label top", "run")
def cmd_search(flags):
    """Find samples by words: query -> latents with fitting names -> samples, with a control of shuffled names."""
    coded = Coded(flags.run, flags)
    names = read_names(needed(flags, "names"), coded.model.n_latents)
    if flags.embeddings:
        arrays = data.read_arrays(flags.embeddings)
        fits = {"latents", "vectors", "query"} <= arrays.keys() and arrays["vectors"].shape == (
            len(arrays["latents"]), *arrays["query"].shape) and all(
            np.issubdtype(arrays[key].dtype, np.number) for key in ("latents", "vectors", "query"))
        if not fits or not np.isin(arrays["latents"], list(names)).all():
            raise InputError(f"{flags.embeddings} - give latents (n,) that --names names, vectors (n, e) of the names, and "
                             "query (e,), all of them numbers")
        unit = arrays["vectors"] / np.maximum(np.linalg.norm(arrays["vectors"], axis=1, keepdims=True), 1e-12)
        fit = unit @ arrays["query"] / max(np.linalg.norm(arrays["query"]), 1e-12)
        weights = {int(arrays["latents"][i]): float(fit[i]) for i in np.argsort(-fit)[:10] if fit[i] > 0}
    else:
        weights = judge.name_weights(needed(flags, "query"), names)
    if not weights:
        raise InputError(f"no name fits '{flags.query}' - try other words, or --embeddings")
    _, rows = coded.split()
    scale = np.asarray(coded.strength.max(axis=0).todense()).ravel()                        # latents count alike

    def ranking(weights):
        latents = list(weights)
        return np.argsort(-(coded.strength[rows][:, latents] @ (np.array(list(weights.values()))
                                                               / np.maximum(scale[latents], 1e-12))), kind="stable")
    order = ranking(weights)
    print("latents: " + ", ".join(f"{j} '{names.get(j, '')}' {w:.2f}" for j, w in
                                  sorted(weights.items(), key=lambda v: -v[1])[:10]))
    for row in rows[order[:flags.top]]:
        print("  " + ", ".join(f"{k} {v}" for k, v in coded.about(row).items()))
    if flags.label is not None:
        y, _, known = coded.told(flags.label)
        if len(known) < len(rows):
            rows = known
            order = ranking(weights)
        y = y[rows]
        rng = np.random.default_rng([coded.flags.seed, 11])
        control = [y[ranking(dict(zip(rng.choice(list(names), len(weights), replace=False).tolist(), weights.values())))
                     [:flags.top]].mean() for _ in range(100)]
        print(f"precision at {flags.top} for '{flags.label}': {y[order[:flags.top]].mean():.3f}; with names shuffled "
              f"{judge.mean_std(control)}; share of all samples {y.mean():.3f}")


@command(f"{ON_RUN} sparc json", "run", "other")
def cmd_compare(flags):
    """Do two runs have latents in common? Best pairing by activation, against shuffled samples and a shared code."""
    both = [Coded(run, flags.replaced({"stream": stream})) for run, stream in
            zip((flags.run, flags.other), (flags.streams or flags.stream or "").split(",") * 2)]
    if len(both[0].features) != len(both[1].features):
        raise InputError(f"{flags.run} was trained on {len(both[0].features)} samples, {flags.other} on "
                         f"{len(both[1].features)} - compare runs on the same samples, or name their file with --data")
    found, (_, rows) = {}, both[0].split()

    def add(name, a, b, pairing):
        r = judge.match_latents(a, b)[2] if pairing == "best" else judge.index_correlations(a, b)
        found[name] = {"pairs": len(r), **{f"r >= {t}": int((r >= t).sum()) for t in (0.5, 0.7, 0.9)},
                       "median r": float(np.median(r)) if len(r) else None,
                       "shared, %": 100 * (r >= 0.5).mean() if len(r) else None}
    shuffled = np.random.default_rng([both[0].flags.seed, 12]).permutation(len(rows))
    kinds = [("the two runs, best pairing", "best", [c.strength[rows] for c in both])]
    if flags.sparc:
        model, config = load_run(flags.sparc, flags.device)
        if both[0].stream == both[1].stream:
            raise InputError(f"both runs are on '{both[0].stream}' - --sparc wants two streams")
        features, _ = features_for(model, config, flags.replaced({"streams": ",".join(c.stream for c in both)}))
        if len(features) != len(both[0].features):
            raise InputError(f"{flags.sparc} was trained on {len(features)} samples, the others on {len(both[0].features)} - "
                             "name their file with --data")
        T = features.tokens or 1
        tokens = (rows[:, None] * T + np.arange(T)).ravel()
        for mode in ("joint", "alone"):
            codes, _ = codes_and_fit(model, features.per_token(), tokens, mode, flags.device)
            kinds.append((f"SPARC {mode}, same latent", "same", [judge.pool_tokens(code, T)[0] for code in codes.values()]))
    for name, pairing, (a, b) in kinds:
        add(name, a, b, pairing)
        add(f"{name}, samples shuffled", a, b[shuffled], pairing)
    columns = list(found[kinds[0][0]])
    print(judge.text_table([f"{len(rows)} samples", *columns], [[name, *row.values()] for name, row in found.items()]))
    if flags.json:
        judge.write_json(out_file(flags, "json"), found)


# ------------------------------------------------------------------------------------------------
# Images and words (thesis 5.3-5.4, A.3-A.4): tissue, a small CLIP, heat maps, retrieval
# ------------------------------------------------------------------------------------------------

@command("pictures size=64 seed=0 overwrite out=tissue")
def cmd_tissue(flags):
    """Draw microscope-like pictures whose cells, captions, masks, patients and diseases are known."""
    run = Run(flags)
    made = data.tissue(flags.pictures, flags.size, flags.seed)
    pixels, parents = made.pop("pixels"), made.pop("parents")
    run.begin()
    names = np.array([f"images/{i:05d}.png" for i in range(len(pixels))])
    for path, picture in zip(run.paths(names.tolist()), pixels):
        Image.fromarray(picture).save(path)
    judge.write_npz(run.path("tissue.npz"), {**made, "images": names})
    judge.write_npz(run.path("patients.npz"), {
        "images": names, "labels": made["disease"], "label_names": made["disease_names"],
        **{key: made[key] for key in ("groups", "split", "captions")}})
    for group, slide in data.patient_slides(pixels, made["groups"]):
        row = np.flatnonzero(made["groups"] == group)[0]
        place = "slides", str(made["split"][row]), str(made["disease_names"][made["disease"][row]])
        judge.save_picture(run.path(*place, f"{group:04d}.png"), Image.fromarray(slide))
    judge.write_json(run.path("taxonomy.json"), parents)
    kinds = made["label_names"][:len(data.CELLS) + 1].tolist()
    rows = [np.flatnonzero(made["labels"][:, c])[:8] for c in range(len(kinds))]
    sheet = [[Image.fromarray(pixels[i]) for i in some] for some in rows]
    judge.save_picture(run.path("sheet.png"), judge.contact_sheet(sheet, [""] * 8, 96, kinds))
    for name, n in zip(made["label_names"], made["labels"].sum(0)):
        print(f"{name}: in {n} pictures")
    for c, name in enumerate(made["disease_names"]):
        mine = made["disease"] == c
        parts = ", ".join(f"{(made['split'][mine] == part).sum()} {part}"
                          for part in ("train", "val", "test"))
        print(f"{name}: {len(np.unique(made['groups'][mine]))} patients, pictures: {parts}")
    say(f"wrote {run.join('tissue.npz')}, {len(pixels)} pictures, and sheet.png")


@command("images window weights merges size=64 patch=8 width layers joint context epochs=20 "
         "batch=128 lr=1e-3 seed=0 device overwrite out=runs/clip")
def cmd_clip(flags):
    """Train a small CLIP on pictures and their captions: image and text encoders into one space
    (thesis 5.3.1)."""
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
    parts = (("train",), ("test", "val")) if images.split is not None else ((), ())
    train, test = (images.rows(*part) for part in parts)
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
    object.__setattr__(model.visual, "clip", model)          # no submodule: it is the other way round
    model.visual.words = words
    return model.visual, model.visual.size


@command(f"{ON_RUN} window images! weights! size=0 label start-layer latent least most seed=0",
         "run?")
def cmd_explain(flags):
    """Heat maps of what backbones look at (Grad-CAM of an output, thesis 3.2.4); given a run of
    sparc, of its concepts in pixels and words, and what they segment (5.4.4, A.3-A.4; --most is
    then 400)."""
    if flags.run is not None:
        return explain_concepts(flags)
    images = pictures_of(flags)
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
        if wanted is not None and not (wanted.isdigit() and int(wanted) < outputs):
            raise InputError(f"--label {wanted}, but {name} has {outputs} outputs - give 0 to "
                             f"{outputs - 1}")
        score = None if wanted is None else lambda out: out[:, int(wanted)]
        heat = judge.grad_cam(model, *ssm.cam_layer(model, x), x, score)
        columns[name] = [judge.overlay(p, h) for p, h in zip(pictures, heat)]
    run = Run(flags, flags.out or "runs/cam").begin(data_hash=images.hash)
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
    page = judge.Page("repsae explain: concepts in pixels and words")
    names, picture = seen.features.label_names, seen.images.open
    maps = measured_maps(seen, page)
    gallery, drawn = judge.map_gallery(maps, seen.truth, names, picture)
    page.picture("Maps", gallery)
    page.metrics["words"] = label_words(seen)
    page.picture("Words", judge.word_table(page.metrics["words"]))
    for key, title, (shown, asked, called, said) in (
            ("latents", "Single latents, where in the test pictures and captions they are most active",
             latent_maps(seen)),
            ("captions", "Pictures with their captions: similarity of the two", caption_maps(seen))):
        found = judge.map_gallery(shown, asked, called, picture, 4)[0] + judge.word_table(said)
        page.picture(title, found or "<p>No latent of a label is alive in every stream; --latent "
                     "names others.</p>")
        page.metrics[key] = said
    run.begin()
    judge.write_npz(run.path("maps.npz"), {"keys": np.array(list(seen.truth)), **{
        method: np.stack([of.get(key, np.full_like(next(iter(of.values())), np.nan))
                          for key in seen.truth]) for method, of in maps.items() if of}})
    for (i, c, method), image in drawn.items():
        name = re.sub(r"[^\w-]+", "_", f"{i}_{names[c]}_{method}")
        judge.save_picture(run.path("overlays", f"{name}.png"), image)
    page.write(run.path)
    say(f"wrote {run.join('report.html')}")


class Concepts:
    """A run of sparc with the backbones that made its streams, and pictures with true masks.

    sees         {name: (backbone, its stream)} of --weights; `encoder`, CLIP's image encoder, with
                 its .clip and .words; `pictured` and `text`, its streams of pictures and captions
    J, alive     each label's latents (`judge.concept_latents`); each stream's, active in training
    truth        {(picture, label): bool mask} of the pictures `test`; `chosen`: --latent
    """

    def __init__(self, flags):
        self.model, config = load_run(flags.run, flags.device)
        self.features, self.flags = features_for(self.model, config, flags)
        self.images, arrays = self._pictures()
        self.sees, self.encoder, self.pictured, self.text = {}, None, None, None
        for spec in flags.weights.split(","):
            self._see(*load_backbone(spec, self.flags)[:2])
        if self.text not in self.model.dims:
            raise InputError("no text encoder - name a run of clip in --weights, and have its text "
                             "stream in the sparc run")
        features, train = self.features, self.features.rows("train")
        labels, known = features.label_matrix(train), features.labelled[train]
        chose = self.codes(train, "alone" if self.model.topk == "local" else "joint")
        self.J = judge.concept_latents(chose, labels, flags.least, known)
        self.alive = {s: np.flatnonzero(code.getnnz(axis=0))
                      for s, code in self.codes(train, "alone").items()}
        self.chosen = chosen_latents(flags.latent, self.J, self.alive, self.model.n_latents)
        truth, most = true_masks(arrays), flags.most if "most" in flags.given else 400
        there = {i for i, _ in truth}
        self.test = [i for i in features.rows("test", "val") if i in there][:most]
        self.truth = {key: m for key, m in truth.items() if key[0] in set(self.test)}
        if not self.truth:
            raise InputError(f"no test picture of {flags.images} has an object - there is nothing "
                             "to segment")

    def _pictures(self):
        """The pictures of --images and their file's arrays, once they fit the features and run."""
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
        return images, arrays

    def _see(self, name, backbone):
        """Enter a backbone; one without attention under the name of what it gets instead."""
        depth, stream = len(judge.kept_attention(backbone)), name
        if hasattr(backbone, "clip"):
            if self.encoder is not None:
                raise InputError("two runs of clip in --weights - name one, whose words are meant")
            self.encoder, self.pictured, self.text = backbone, f"{name}_img", f"{name}_txt"
            stream = self.pictured
            depth = min(depth, len(judge.kept_attention(backbone.clip.transformer)))
        start = self.flags.start_layer
        if depth and not -depth <= start < depth:
            raise InputError(f"--set start-layer={start} - {name} has {depth} layers")
        if stream not in self.model.dims:
            raise InputError(f"the run has no stream '{stream}' - it has "
                             f"{', '.join(self.model.streams)}")
        self.sees[name if depth else f"{name} (Grad-CAM)"] = backbone, stream

    def codes(self, rows, mode):
        """{stream: CSR (n, L)} of samples."""
        return codes_and_fit(self.model, self.features, rows, mode, self.flags.device)[0]

    def code(self, stream, x):
        """Features (B, d) -> dense codes (B, L) of a stream alone."""
        return self.model.encode({stream: x}, "alone")[stream].dense(self.model.n_latents)

    def captions(self, rows):
        return [str(self.features.about["captions"][i]) for i in rows]

    def said(self, captions):
        """Features (n, d) of captions."""
        return ssm.text_features(self.encoder.clip, self.encoder.words, captions)

    def words(self, concept, caption, here, score):
        """A caption with what each word adds to score(codes (1, L)), for `judge.word_table`."""
        heat = judge.word_heat(self.encoder.clip, self.encoder.words, caption,
                               lambda f: score(self.code(self.text, f)), self.flags.start_layer)
        return {"concept": concept, "caption": caption, "here": bool(here), "words": heat}

    def maps(self, backbone, score, asked, block=64):
        """{(picture, label): heat map} of score(features, label) for pairs `asked`, and those of
        them whose score is 0."""
        view, out, silent = data.plain_view(getattr(backbone, "size", 224), True), {}, []
        for c in sorted({c for _, c in asked}):
            rows = [i for i, k in asked if k == c]
            for part in (rows[at:at + block] for at in range(0, len(rows), block)):
                x = torch.stack([view(self.images.open(i)) for i in part]).to(self.flags.device)
                heats, values = judge.heat_maps(
                    backbone, x, lambda f: score(f, c),
                    functools.partial(ssm.cam_layer, backbone), self.flags.start_layer)
                out.update({(i, c): heat for i, heat in zip(part, heats)})
                silent += [(i, c) for i, value in zip(part, values) if value == 0]
        return out, silent


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


def true_masks(arrays):
    """{(image, label): bool mask} of the objects of each label together, from `instances` and `boxes`; hidden objects have
    no box."""
    out, instances, boxes = {}, arrays["instances"], arrays["boxes"]
    for i in np.unique(boxes[:, 0].astype(int)):
        here = boxes[boxes[:, 0] == i]
        numbers = [n for n in np.unique(instances[i]) if n]
        for n, box in zip(numbers, here):
            key = int(i), int(box[1])
            out[key] = out.get(key, False) | (instances[i] == n)
    return out


def methods(seen):
    """{name: (backbone, score(features, label) -> (B,), labels that it can be asked for)}: the
    targets of Table 5.4 for each backbone, and CLIP's own similarity. A label's text is its name."""
    names, out, unit = seen.features.label_names, {}, torch.nn.functional.normalize
    for c in {c for _, c in seen.truth}:
        seen.encoder.words.pieces(names[c])                  # raises InputError for an unknown word
    prompts = seen.said(names)
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
        seen.encoder, lambda f, c: unit(f, dim=1) @ unit(prompts[c], dim=0), range(len(names)))
    return out


def measured_maps(seen, page):
    """The maps of every method, {name: {(picture, label): (h, w)}}, and what they segment."""
    labels, maps, found = sorted({c for _, c in seen.truth}), {}, {}
    pairs = [(i, c) for i in seen.test for c in labels]      # there or not
    without = [seen.features.label_names[c] for c in labels if not len(seen.J[c])]
    if without:
        say(f"note: no latent of {', '.join(without)} - lower --least")
    for name, (backbone, score, possible) in methods(seen).items():
        asked = [pair for pair in pairs if pair[1] in possible]
        maps[name], silent = seen.maps(backbone, score, asked)
        found[name] = {**judge.map_scores(maps[name], asked, seen.truth, data.otsu),
                       "absent": len(silent), "maps of absent that are not 0":
                       sum(bool(maps[name][key].any()) for key in silent)}
    middle = dict.fromkeys(pairs, judge.centre_prior())
    found["centre of the picture"] = judge.map_scores(middle, pairs, seen.truth, data.otsu)
    columns = ["AP", "AR", "mIoU", "AP small", "AP medium", "AP, all asked",
               "drawn though absent, %"]
    page.table([f"{len(seen.test)} pictures, {len(seen.truth)} masks", *columns],
               [[name, *(v[c] for c in columns)] for name, v in found.items()],
               "Segmentation by heat maps: of the labels that are there, as published, and of all")
    page.metrics["segmentation"] = found
    return maps


def label_words(seen, most=2):
    """For labels with latents, captions that name the concept and one without it, by words."""
    out, labels = [], seen.features.label_matrix(seen.test)
    known = seen.features.labelled[seen.test]
    for c in sorted({c for _, c in seen.truth if len(seen.J[c])}):
        name = seen.features.label_names[c]
        said = [(caption, labels[n, c]) for n, caption in enumerate(seen.captions(seen.test))
                if known[n]]
        shown = [v for v in said if v[1] and name in v[0]][:most] + [v for v in said if not v[1]][:1]
        out += [seen.words(name, caption, here, lambda z: z[:, seen.J[c]].sum(1))
                for caption, here in shown]
    return out


def latent_maps(seen, most=4):
    """Single latents z_j (thesis Fig. 5.4) in the test samples where they are most active over all
    streams: maps, their pairs (picture, j), names of j, and words of those samples' captions."""
    codes, pairs, said = seen.codes(np.array(seen.test), "alone"), [], []
    for j in seen.chosen:
        columns = {s: code[:, [j]].toarray()[:, 0] for s, code in codes.items()}
        strength = sum(z / max(z.max(), 1e-12) for z in columns.values())
        for n in np.argsort(-strength, kind="stable")[:most]:
            pairs.append((seen.test[n], j))
            said.append(seen.words(f"latent {j}", *seen.captions([seen.test[n]]),
                                   columns[seen.text][n], lambda z: z[:, j]))
    maps = {f"z, {name}": seen.maps(backbone, lambda f, j: seen.code(s, f)[:, j], pairs)[0]
            for name, (backbone, s) in seen.sees.items()}
    return maps, pairs, {j: f"latent {j}" for j in seen.chosen}, said


def caption_maps(seen, most=4):
    """Similarity of a picture to its own caption (thesis A.4.1), by z^s . z^t alone and by CLIP
    itself: as `latent_maps`."""
    test, unit = seen.test[:most], torch.nn.functional.normalize
    captions, pictured = seen.captions(test), seen.pictured
    f_text = seen.said(captions)
    with torch.no_grad():
        z_text = seen.code(seen.text, f_text)
        own = seen.features.batch(test)[pictured].to(seen.flags.device)
        z_image = seen.code(pictured, own)
    pairs, maps = [(i, n) for n, i in enumerate(test)], {}
    for name, (backbone, s) in seen.sees.items():
        maps[f"z z', {name}"], _ = seen.maps(
            backbone, lambda f, n: seen.code(s, f) @ z_text[n], pairs)
    maps["cosine, CLIP itself"], _ = seen.maps(
        seen.encoder, lambda f, n: unit(f, dim=1) @ unit(f_text[n], dim=0), pairs)
    said = [seen.words("caption", caption, True, lambda z: z @ z_image[n])
            for n, caption in enumerate(captions)]
    return maps, pairs, captions, said


@command(f"{ON_RUN} sample from to query features encoder", "run")
def cmd_retrieve(flags):
    """Show what a sample of one stream finds in another: a sheet of the ten nearest codes, joint
    and alone."""
    model, config = load_run(flags.run, flags.device)
    features, flags = features_for(model, config, flags)
    source, target = flags["from"] or model.streams[0], flags.to or model.streams[-1]
    for s in (source, target):
        if s not in model.dims or s not in features.streams:
            has = [name for name in model.streams if name in features.streams]
            raise InputError(f"there is no stream '{s}' - the run and the data have "
                             f"{', '.join(has)}")
    rows, page = features.rows("test", "val"), judge.Page("repsae retrieve")
    outside = flags.query is not None or flags.features is not None      # a query that is no sample
    if not outside and flags.sample >= len(rows):
        raise InputError(f"--sample {flags.sample} - give one of the {len(rows)} "
                         f"{features.split[rows[0]]} samples, from 0")

    def shown(i, stream):
        own = not outside and i == flags.sample and stream == target
        frame = '<span style="outline:3px solid #2f855a">' if own else "<span>"
        if stream.endswith("_txt") and "captions" in features.about:
            return f"{frame}{html.escape(str(features.about['captions'][rows[i]]))}</span>"
        return f"{frame}{judge.describe_sample(features, rows[i])}</span>"
    given, first = given_query(model, source, flags) if outside else \
        (None, shown(flags.sample, source))
    for mode in ("alone",) if outside else ("joint", "alone"):
        codes, _ = codes_and_fit(model, features, rows, mode, flags.device)
        query = given if outside else codes[source][[flags.sample]]
        if not query.nnz:
            page.text(f"{mode}: no latent is active in the query, so that nothing is near it")
            continue
        (near,), (similar,) = judge.nearest(query, codes[target], len(rows))
        partner = ""
        if not outside:
            rank = (similar >= similar[near == flags.sample]).sum()
            partner = f"the true partner has rank {rank} of {len(rows)}; "
        page.text(f"{mode}: {partner}nearest samples {rows[near[:10]].tolist()}")
        page.picture(f"{source} to {target}, {mode}",
                     judge.strip(first, *(shown(i, target) for i in near[:10])))
    run = analysis_run(flags, f"retrieve_{source}_{target}_{'given' if outside else flags.sample}")
    run.begin()
    page.write(run.path)
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

@command("window voc! size=64 margin overwrite out=cells")
def cmd_cut(flags):
    """Cut the annotated boxes of a Pascal VOC folder into small pictures, in class folders, by its official splits."""
    if os.path.exists(flags.out):                            # until it cuts through a Run
        raise InputError(f"{flags.out} exists - name a new folder with --out")
    count = data.cut_boxes(flags.voc, flags.out, flags.size, flags.margin, grey_window(flags))
    print("\n".join(f"{split} {name}: {n}" for (split, name), n in sorted(count.items())))


@command("images! window size=224 step downsample threshold otsu smallest least-hole max-holes rois "
         "roi-share overwrite out=tiles")
def cmd_tile(flags):
    """Find the tissue of slides and lay tiles over it: for each slide a file of coordinates and an overview picture."""
    source = flags.images
    slides, notes = data.slide_files(source)
    for note in notes:
        say_once("note: " + note)
    side, step = (round(v * flags.downsample) for v in (flags.size, flags.step or flags.size))
    if side < 1 or step < 1:
        raise InputError(f"--size {flags.size}: tiles of {side} pixels every {step} - give a larger --size, --step or --downsample")
    if flags.rois and len(slides) > 1:
        raise InputError("--rois annotates one slide - name that slide with --images")
    regions = data.read_polygons(flags.rois) if flags.rois else None
    targets = [os.path.splitext(os.path.basename(path))[0] for path in slides]
    for target in targets:
        if targets.count(target) > 1:
            raise InputError(f"two slides are called {target} - rename one, or tile them into two folders")
    run = Run(flags)
    for path, target in zip(slides, targets):
        boxes, shown = data.tile_slide(path, side, step, least=flags.smallest, least_hole=flags.least_hole,
                                       max_holes=flags.max_holes, window=grey_window(flags),
                                       threshold=None if flags.otsu else flags.threshold)
        if not run.about:                                    # a slide that cannot be read leaves nothing
            run.begin()
        arrays = {"coords": boxes, "images": relative([path] * len(boxes), run.join(f"{target}.npz"))}
        if regions is not None:
            share = np.array([data.region_share(regions, box) for box in boxes])
            arrays.update(labels=(share >= flags.roi_share).astype(int), label_names=np.array(["outside", "region"]))
        judge.write_npz(run.path(f"{target}.npz"), arrays)
        judge.save_picture(run.path(f"{target}.png"), shown)
        inside = "" if regions is None else f", {arrays['labels'].sum()} of them in the regions"
        print(f"{run.join(target)}.npz: {len(boxes)} tiles of {side} pixels{inside}")


@command("data! stream head widths attention dropout squash instances bag-weight inst-loss subtyping "
         "epochs=200 patience=20 min-epochs batch=1 lr=2e-4 cosine weight-decay=1e-5 balanced inner "
         "refit grid seed=0 device overwrite out=runs/mil")
def cmd_mil(flags):
    """Multiple-instance learning: bags of instances to labels, early stopping on a part that is not reported."""
    heads = flags.head.split(",")
    for head in heads:
        if head not in ssm.HEADS:
            raise InputError(f"--head {head} - take one or more of {', '.join(ssm.HEADS)}")
    settings, _ = parse_grid(flags), number_list(flags.widths)
    bags = data.read_bags(flags.data, flags.stream)
    rounds = mil_rounds(bags, flags)
    run = Run(flags).begin(bags=len(bags), rounds=len(rounds), data_hash=bags.hash)
    found = {"mean of the bag, logistic": [pooled_baseline(bags, train, test) for train, _, test in rounds]}
    log = Log(run.path("log.csv"))
    for head in heads:
        jobs = [(head, settings, r, *parts) for r, parts in enumerate(rounds)]
        if len(jobs) == 1:
            done = [mil_round(bags, *jobs[0], keep=run)]
        else:
            with futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), share_bags, [bags]) as pool:
                progress, done = Progress(len(jobs)), []
                for result in pool.map(mil_round_of_shared, *zip(*jobs)):
                    done.append(result)
                    progress(len(done), lambda: head)
        found[head] = done
        for r, result in enumerate(done, 1):                 # the error and loss on held-out bags that chose the setting
            held, chosen = result["held_out"] or {"error": "", "loss": ""}, json.dumps(result["chosen"])
            log.add({"head": head, "round": r, "chosen": chosen, **{f"held-out {k}": v for k, v in held.items()},
                     **result["scores"]})
        log.write()
    names = ("AUC", "accuracy", "F1")
    header = ["head", *names]
    rows = [[head, *(judge.mean_std([r["scores"][name] for r in runs]) for name in names)] for head, runs in found.items()]
    print(f"\n{judge.text_table(header, rows)}\n\n{len(rounds)} test part{'s' * (len(rounds) > 1)} of about "
          f"{len(rounds[0][2])} bags; mean ± standard deviation over them")
    judge.write_json(run.path("metrics.json"), found)
    sections = [("Result", judge.html_table(header, rows))]
    for head in heads if bags.coords and len(rounds) == 1 else ():
        sections.append((f"Attention of {head} over test slides", attention_maps(bags, head, rounds[0][2], run)))
    judge.write_report(run.path("report.html"), "repsae mil", sections)
    say(f"wrote {run.join('report.html')}")


SHARED = {}    # in a process among several: what all its jobs use


def share_bags(bags):
    """Begin such a process: it has one thread, since they share the cores, and the bags."""
    torch.set_num_threads(1)
    SHARED["bags"] = bags


def mil_round_of_shared(*job):
    return mil_round(SHARED["bags"], *job)


def parse_grid(flags):
    """--grid "lr=1e-4,5e-4 dropout=0,0.5" -> a list of all combinations, each the flags with those values."""
    options = []
    for item in (flags.grid or "").split():
        name, _, values = item.partition("=")
        kind = FLAGS.get(name, (None, None))[1] if name in COMMANDS["mil"].flags else None
        if not isinstance(kind, Number) or name in ("seed", "inner"):
            raise InputError(f'--grid {item} - write for example "lr=1e-4,5e-4 dropout=0,0.5"')
        try:
            options.append([(name.replace("-", "_"), kind(v)) for v in values.split(",")])
        except argparse.ArgumentTypeError as e:
            raise InputError(f"--grid {item}: {e}")
    return [flags.replaced(dict(chosen)) for chosen in itertools.product(*options)]


def mil_rounds(bags, flags):
    """[(rows to learn from, rows of a given validation part or None, rows to report)]: the file's folds, or its splits, or
    70 % / 15 % / 15 % with every class in proportion."""
    everything = np.arange(len(bags))
    if bags.folds is not None:
        rounds = [(everything[fold], None, everything[~fold]) for repeat in bags.folds for fold in repeat]
    elif bags.split is None:
        rounds = [data.stratified_parts(bags.y, (70, 15, 15), flags.seed, bags.groups)]
    else:
        rounds = [[np.flatnonzero(bags.split == name) for name in ("train", "val", "test")]]
    least = max(flags.inner, 5)                              # of each class, so that no validation part is empty
    for train, val, test in rounds:
        rarest = np.bincount(bags.y[train], minlength=bags.y.max() + 1)[np.unique(bags.y)].min()
        given = val is not None and len(val)
        if not len(test) or rarest < (2 if given else least):
            raise InputError(f"{flags.data}: a part of {len(train)} bags to learn from, {rarest} of the rarest class, and "
                             f"{len(test)} to test on is too small - add bags, or mend the folds or split folders")
        groups = 0 if bags.groups is None else len(np.unique(bags.groups[train]))
        if 0 < groups < least and not given:
            raise InputError(f"{flags.data}: the bags to learn from are of {groups} groups, and "
                             f"validation cuts them into {least} parts - add groups")
    return [(train, val if val is not None and len(val) else None, test) for train, val, test in rounds]


def mil_round(bags, head, settings, round_, train, val, test, keep=None):
    """Choose the setting with the fewest errors (then the lowest loss) on bags held out of `train`, and report its models'
    mean vote on `test`.

    Without `val`, train is cut into parts, and --inner times a model learns from all but one of them. Its bags stop it early,
    and these models vote; or, with --refit, all epochs are trained, and as many models on all of train vote. keep: a folder
    for the weights.
    """
    flags, best = settings[0], None
    if val is not None:
        parts = [(train, val)]
    else:
        groups = None if bags.groups is None else bags.groups[train]
        equal = [1] * max(flags.inner, 5 if flags.inner == 1 else 2)
        cut = data.stratified_parts(bags.y[train], equal, flags.seed + round_, groups)
        parts = [(np.delete(train, part), train[part]) for part in cut[:flags.inner]]
    for setting in settings:
        if flags.refit and len(settings) == 1:               # nothing to choose
            best = None, (), setting
            break
        models, held = zip(*(train_mil(bags, head, setting, *part, seed=[setting.seed, round_, i])
                             for i, part in enumerate(parts)))
        held = np.mean(held, 0).tolist()                     # error, loss
        if best is None or held < best[0]:
            best = held, models, setting
    held, models, setting = best
    if flags.refit:
        models = [train_mil(bags, head, setting, train, None, seed=[setting.seed, round_, 99, i])[0]
                  for i in range(flags.inner)]
    with torch.no_grad():
        votes = [np.concatenate([torch.softmax(m(x.to(flags.device), mask.to(flags.device))[0], 1).cpu().numpy()
                                 for x, mask, _ in (bags.padded([i]) for i in test)]) for m in models]
    if keep:
        judge.write_torch(keep.path(f"{head}.pt"), {
            "models": [m.state_dict() for m in models], "head": head, "dim": bags.X.shape[1],
            "label_names": bags.label_names, **{k: setting[k] for k in ("widths", "attention", "dropout", "squash")}})
    return {"scores": judge.scores(bags.y[test], np.mean(votes, 0)),
            "held_out": held and {"error": held[0], "loss": held[1]},
            "chosen": {k: setting[k] for k in setting if len({str(s[k]) for s in settings}) > 1}}


def train_mil(bags, head, flags, train, val, seed):
    """One model, stopped by the loss on `val`: (model, (error rate, loss) of its bags)."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(int(rng.integers(2 ** 62)))
    model = ssm.MIL(bags.X.shape[1], len(bags.label_names), head, number_list(flags.widths), flags.attention, flags.dropout,
                    bool(flags.squash))
    X = bags.instances(train)
    model.mean.copy_(torch.from_numpy(X.mean(0)))
    spread = (X - X[0]).std(0)                               # of a constant exactly 0
    model.std.copy_(torch.from_numpy(np.where(spread > 1.2e-7 * np.abs(X[0]), spread, 1)))
    model.to(flags.device)
    y = bags.y[train]
    weight = 1 / np.bincount(y)[y] if flags.balanced else np.ones(len(y))
    how = {"k": flags.instances, "bag_weight": flags.bag_weight, "subtyping": flags.subtyping,
           "loss": {"svm": ssm.smooth_top1_svm, "ce": torch.nn.functional.cross_entropy}[flags.inst_loss]}

    def batches(epoch):
        if flags.cosine:
            optimiser.param_groups[0]["lr"] = ssm.cosine_schedule(epoch, flags.epochs, flags.lr, 0.)
        order = rng.choice(train, len(train), replace=flags.balanced, p=weight / weight.sum())
        for i in range(0, len(order), flags.batch):
            yield [v.to(flags.device) for v in bags.padded(order[i:i + flags.batch])]
    held = [] if val is None else [[v.to(flags.device) for v in bags.padded(val[i:i + flags.batch])]
                                   for i in range(0, len(val), flags.batch)]

    def judged(model):                                       # by the bags' labels alone
        logits, y = (torch.cat(v) for v in zip(*((model(x, mask)[0], y) for x, mask, y in held)))
        return float((logits.argmax(1) != y).float().mean()), float(torch.nn.functional.cross_entropy(logits, y))
    optimiser = torch.optim.Adam(model.parameters(), flags.lr, weight_decay=flags.weight_decay, fused=True)
    early = {} if flags.refit else {"validate": lambda m: judged(m)[1], "patience": flags.patience, "least": flags.min_epochs}
    ssm.fit(model, optimiser, batches, lambda m, *batch: ssm.mil_loss(m, *batch, **how), flags.epochs, **early)
    with torch.no_grad():
        return model, judged(model) if held else None


def number_list(text):
    """"256,64" -> (256, 64); raises InputError otherwise."""
    try:
        found = tuple(map(int, text.split(",")))
        if min(found) > 0:
            return found
    except ValueError:
        pass
    raise InputError(f"{text} - give positive whole numbers, separated by commas")


def pooled_baseline(bags, train, test):
    """What no attention gets: logistic regression on the mean of a bag's instances."""
    means = np.stack([bags.instances([i]).mean(0, dtype=np.float64) for i in range(len(bags))])
    p = judge.logistic_probe(means[train], bags.y[train], means[test], len(bags.label_names), strength=0.01)
    return {"scores": judge.scores(bags.y[test], p)}


def attention_maps(bags, head, rows, run, most=6):
    """Test slides with each tile coloured by its share in the bag, as files heat_<label>_<slide>_<head>.png and as HTML."""
    kept = torch.load(run.join(f"{head}.pt"), weights_only=True)
    shown = []
    for i in [i for i in rows if bags.coords[i] is not None and bags.images[i]][:most]:
        heat = 0
        for state in kept["models"]:
            model = ssm.MIL(kept["dim"], len(bags.label_names), head, number_list(kept["widths"]), kept["attention"],
                            squash=bool(kept["squash"])).eval()
            model.load_state_dict(state)
            with torch.no_grad():
                heat = heat + torch.softmax(model(bags.padded([i])[0])[1], -1)[0].mean(0).numpy()
        image, scale = data.Slide(bags.images[i]).overview(1024)
        picture = judge.box_overlay(image, bags.coords[i], heat, scale)
        judge.save_picture(run.path(f"heat_{bags.label_names[bags.y[i]]}_{bags.names[i]}_{head}.png"), picture)
        shown.append(f"<h3>{html.escape(f'{bags.names[i]}: {bags.label_names[bags.y[i]]}')}</h3>"
                     + judge.strip(judge.embedded(image), judge.embedded(picture)))
    return "".join(shown) or "<p>The bags name no pictures.</p>"


# ------------------------------------------------------------------------------------------------
# Transfer learning (thesis 3.3), heat maps (3.2.4)
# ------------------------------------------------------------------------------------------------

@command("images! label weights=vit_micro,vim_micro,vmamba_micro,resnet18 split runs size=224 patch "
         "frozen epochs=50 patience=10 batch=32 lr=1e-4 weight-decay=0.05 seed=0 window device "
         "overwrite out=runs/finetune")
def cmd_finetune(flags):
    """Fine-tune classifiers over several seeds, and test which is better than which."""
    pictures = data.read_pictures(flags.images, flags.size, flags.label,
                                  grey_window(flags))
    for note in pictures.notes:
        say_once("note: " + note)
    specs, C = flags.weights.split(","), len(pictures.label_names)
    names = [try_classifier(spec, flags, C) for spec in specs]                              # before anything is written
    if len(set(names)) < len(names):
        raise InputError(f"--weights {flags.weights} names a model twice - write a=vit_micro:random,b=vit_micro:random")
    rounds = [picture_parts(pictures, flags, flags.seed + r) for r in range(flags.runs)]
    run = Run(flags).begin(pictures=len(pictures.labels), data_hash=pictures.hash)
    log = Log(run.path("log.csv"))
    found, sizes = {"pixels, logistic": [pixel_baseline(pictures, parts, C) for parts in rounds]}, {}
    progress = Progress(len(specs) * len(rounds))
    for name, spec in zip(names, specs):
        found[name] = []
        for r, parts in enumerate(rounds):
            one = flags.replaced({"seed": flags.seed + r})
            scores, model, history = finetune_one(pictures, parts, load_backbone(spec, one, C)[1], one)
            found[name].append(scores)
            for epoch, (loss, validation) in enumerate(history, 1):
                log.add({"model": name, "run": r + 1, "epoch": epoch, "loss": loss, "validation": validation})
            log.write()
            progress(sum(map(len, found.values())) - len(rounds), lambda: f"{name}, run {r + 1}: AUC {scores['AUC']:.3f}")
            if r == 0:
                sizes[name] = sum(p.numel() for p in model.parameters())
                judge.write_torch(run.path(f"{name}.pt"), {"model": model.state_dict(), **model.made})
    finish_finetune(run, found, sizes, pictures, rounds)


def finish_finetune(run, found, sizes, pictures, rounds):
    """The tables of thesis 3.3.3, and who beats whom, in print, metrics.json and report.html."""
    header = ["model", "AUC", "accuracy", "balanced accuracy", "F1"]
    rows = [[name, *(judge.mean_std([r[key] for r in runs]) for key in header[1:])] for name, runs in found.items()]
    trained = {name: runs for name, runs in found.items() if not name.startswith("pixels")}
    tests = {key: judge.compare({name: [r[key] for r in runs] for name, runs in trained.items()})
             for key in ("AUC", "accuracy") if len(rounds) > 1}
    print("\n" + judge.text_table(header, rows))
    sections, beats = [(f"{len(rounds)} runs, mean ± standard deviation", judge.html_table(header, rows))], {}
    for key, pairs in tests.items():
        wins = judge.beaten(pairs)
        beats[key] = {a: {b: int(b in wins.get(a, ())) for b in trained if b != a} for a in trained}
        lines = [f"{a} beats {', '.join(b)}" for a, b in wins.items()] or ["no model beats another"]
        print(f"\n{key}, paired t-test at p < 0.05, {len(pairs)} pairs: {'; '.join(lines)}")
        columns = ["a", "b", "difference", "t_p", "holm_p", "wilcoxon_p", "d"]
        cells = [[f"{p['a']} - {p['b']}", *(p.get(c) for c in columns[2:])] for p in pairs]
        head = ["pair", "mean difference", "p (paired t)", "p (Holm)", "p (Wilcoxon)", "effect size d"]
        print(judge.text_table(head, cells))
        sections.append((f"{key}: pairs of models", judge.html_table(head, cells) + f"<p>{'; '.join(lines)}.</p>"))
    note = (f"{len(rounds)} runs make a weak test: the Wilcoxon p cannot fall below {2 / 2 ** len(rounds):.4f}, and the runs' "
            "test parts overlap, so that the t-test takes them for more independent than they are.") if tests else \
        "One run allows no test of which model is better."
    print(f"\n{note}")
    judge.write_json(run.path("metrics.json"),
                     {"scores": found, "pairs": tests, "beats": beats, "parameters": sizes,
                      "test pictures": len(rounds[0][2])})
    sections.append(("How far to trust it", f"<p>{note}</p>"))
    judge.write_report(run.path("report.html"), "repsae finetune", sections)
    say(f"wrote {run.join('report.html')}")


def try_classifier(spec, flags, n_classes):
    """Build a model and pass one picture of zeros through it: its name; raises InputError when it does not fit."""
    name, model, _ = load_backbone(spec, flags, n_classes)
    ssm.last_linear(model)
    try:
        with torch.no_grad():
            out = model.eval()(torch.zeros(1, 3, flags.size, flags.size, device=flags.device))
        fits = isinstance(out, torch.Tensor) and out.shape == (1, n_classes)
    except (RuntimeError, AssertionError):
        fits = False
    if not fits:
        raise InputError(f"{name} does not classify pictures of {flags.size} pixels - choose another --size, or another model")
    return name


def picture_parts(pictures, flags, seed):
    """Rows to train on, to stop by and to report: the file's own split, or 70 / 15 / 15 as
    `stratified_parts` draws them: classes in proportion, no group in two parts."""
    groups = pictures.groups
    if flags.split == "random":
        parts = data.stratified_parts(pictures.labels, (70, 15, 15), seed, groups)
    elif pictures.split is None:
        raise InputError(f"{flags.images} gives no split - use --split random")
    else:
        train, val, test = (np.flatnonzero(pictures.split == name) for name in ("train", "val", "test"))
        if not len(val):                                     # none given: cut off the training part
            of = None if groups is None else groups[train]
            halves = data.stratified_parts(pictures.labels[train], (85, 15), seed, of)
            train, val = (train[rows] for rows in halves)
        parts = train, val, test
    if not all(map(len, parts)) or len(np.unique(pictures.labels[parts[0]])) < 2:
        raise InputError(f"{flags.images}: {', '.join(str(len(p)) for p in parts)} pictures to train on, stop by and test on - "
                         "add pictures, or use --split random")
    tested = np.unique(pictures.labels[parts[2]])
    unseen = np.setdiff1d(tested, pictures.labels[parts[0]])
    if len(tested) < 2 or len(unseen):
        c, what = tested[0], "and no other"
        if len(unseen):
            c, what = unseen[0], "which no training picture has"
        raise InputError(f"{flags.images}: the test part has the class '{pictures.label_names[c]}', "
                         f"{what} - add pictures, or split them otherwise")
    return parts


def pixel_baseline(pictures, parts, n_classes):
    """Logistic regression on pixels, at 32 x 32 at most, its strength chosen on the validation part."""
    side, y = min(32, pictures.pixels.shape[-1]), pictures.labels
    small = [torch.nn.functional.adaptive_avg_pool2d(part.float(), side)
             for part in torch.from_numpy(pictures.pixels).split(256)]
    x = torch.cat(small).flatten(1).numpy() / 255
    train, val, test = parts
    tried = [judge.logistic_probe(x[train], y[train], np.concatenate([x[val], x[test]]), n_classes, strength)
             for strength in 10. ** np.arange(-6, 1)]
    best = max(tried, key=lambda p: judge.scores(y[val], p[:len(val)])["AUC"] or 0.)
    return judge.scores(y[test], best[len(val):])


def finetune_one(pictures, parts, model, flags):
    """Train a classifier, stop by the validation loss, and judge the best epoch on the test rows: (scores, model, history)."""
    torch.set_flush_denormal(True)
    torch.manual_seed(flags.seed)
    train, val, test = parts
    x, y = data.normalised(pictures.pixels), torch.from_numpy(pictures.labels)
    if flags.frozen:
        model.requires_grad_(False)
        ssm.last_linear(model)[1].requires_grad_(True)           # the head

    def batches(epoch):
        for rows in torch.from_numpy(np.random.default_rng([flags.seed, epoch]).permutation(train)).split(flags.batch):
            if len(rows) > 1 or flags.batch == 1:            # batch normalisation needs two
                yield data.jittered(x[rows]).to(flags.device), y[rows].to(flags.device)

    def loss(model, x, y):
        model.train(not flags.frozen)                        # frozen: batch statistics stay, too
        return torch.nn.functional.cross_entropy(model(x), y)

    def outputs(model, rows):
        return torch.cat([model(x[part].to(flags.device)).cpu() for part in torch.from_numpy(rows).split(256)])
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, flags.lr, weight_decay=flags.weight_decay)
    history = ssm.fit(model, optimiser, batches, loss, flags.epochs,
                      lambda m: float(torch.nn.functional.cross_entropy(outputs(m, val), y[val])), flags.patience)
    with torch.no_grad():
        p = torch.softmax(outputs(model.eval(), test), 1).numpy()
    return judge.scores(pictures.labels[test], p), model, history


# ------------------------------------------------------------------------------------------------
# The whole thesis on made-up tissue, in one command
# ------------------------------------------------------------------------------------------------

def demo_stages(out, quick, seed=0):
    """[(heading, what it stands for, command line, the file that shows it was done, pictures, verdict)] in order.

    Everything is what a user can type. A verdict reads what the stage left: ({(the papers' table, quantity): number}, {what
    they find there: whether it is so here}); None where there is nothing to compare.
    """
    at = functools.partial(os.path.join, out)
    stages = [*demo_backbones(at, quick), *demo_labels(at, quick), *demo_codes(at, quick, seed), *demo_latents(at, quick),
              *demo_bags(at, quick, "19. Patients as bags, half size", "Thesis Table 3.7: as 6, at half the magnification.",
                         "half_"),
              ("20. What a head attends to", "Thesis 3.2.2: the pictures of a patient side by side, as a slide.",
               ["mil", "--data", at("slides"), "--head", "abmil", "--epochs", "5" if quick else "50", "--min-epochs", "5",
                "--widths", "64", "--attention", "32", "--inner", "3", "--out", at("mil_slides")],
               at("mil_slides", "report.html"), [], None)]
    return [(heading, about, argv if "--seed" in argv else [*argv, "--seed", str(seed)], *rest)
            for heading, about, argv, *rest in stages]


def demo_backbones(at, quick):
    """The pictures, the encoders, and how well a linear probe reads them; at(*names) is a path in the demo's folder."""
    pictures, epochs, clip = (600, "1", "2") if quick else (2400, "10", "40")
    tissue, both = at("tissue", "tissue.npz"), f"dino_vit={at('dino_vit')},dino_vim={at('dino_vim')}"
    # pixels in units of their own: by ImageNet's all these pale pictures are nearly alike, and DINO collapses
    dino = ["--patch", "8", "--size", "64", "--local-size", "32", "--local-crops", "4", "--local-scale", "0.2,0.6",
            "--global-scale", "0.5,1", "--standardise", "--colour", "0.2", "--blur", "0.5", "--prototypes", "1024",
            "--head-hidden", "512", "--set", "bottleneck=64", "--batch", "64", "--epochs", epochs, "--warmup", "1",
            "--lr", "2e-3", "--momentum", "0.99", "--workers", "1"]
    stages = [("1. A tissue", "Pictures whose truth is known: cells, captions, masks, patients, diseases; thesis Tables "
               "3.1-3.3 tell what data there is.",
               ["tissue", "--pictures", str(pictures), "--out", at("tissue")], tissue, [at("tissue", "sheet.png")], None)]
    for arch in ("vit", "vim"):
        run = at(f"dino_{arch}")
        stages.append((f"2. DINO, {arch}", "Thesis 3.2.1: a backbone learns without labels; k-NN watches.",
                       ["dino", "--images", tissue, "--arch", f"{arch}_micro", *dino, "--out", run],
                       os.path.join(run, "report.html"), [os.path.join(run, n) for n in ("curves.svg", "neighbours.png")],
                       functools.partial(dino_verdict, at, arch)))
    views = (("views", f"{both},random_vit=vit_micro:random,random_vim=vim_micro:random", "64"), ("half", both, "32"))
    for name, weights, size in views:
        stages += [("3. Features", f"Class tokens of the pictures at {size} pixels.",
                    ["extract", "--images", tissue, "--weights", weights, "--last", "1", "--size", size, "--out",
                     at(f"{name}.npz"), "--standardise"], at(f"{name}.npz"), [], None),
                   ("3. Linear evaluation", "Thesis 3.2.3, Table 3.6, and at half the magnification Table 3.8: what is in a "
                    "picture?", ["probe", "--data", at(f"{name}.npz"), "--json", at(f"{name}.json")], at(f"{name}.json"), [],
                    functools.partial(probe_verdict, at) if name == "half" else None)]
    return stages + [
        ("4. A small CLIP", "Thesis 5.3.1: image and text encoders that agree, the other two streams.",
         ["clip", "--images", tissue, "--epochs", clip, "--out", at("clip")], at("clip", "metrics.json"), [], None),
        ("5. Four streams", "Features of the same pictures by every encoder.",
         ["extract", "--images", tissue, "--weights", f"{both},clip={at('clip')}", "--last", "1", "--out", at("feats.npz")],
         at("feats.npz"), [], None)]


def demo_labels(at, quick):
    """The rest of chapter 3: bags, transfer, heat maps."""
    tissue = at("tissue", "tissue.npz")
    return [
        *demo_bags(at, quick, "6. Patients as bags", "Thesis Table 3.5: the disease from features of pictures.", ""),
        ("7. Transfer", "Thesis Tables 3.9-3.11: classifiers trained on labels, and which is better than which.",
         ["finetune", "--images", tissue, "--label", "tumour cell", "--split", "given", "--weights",
          f"vit_micro,vim_micro,vmamba_micro,resnet18,dino_vit={at('dino_vit')}", "--size", "32", "--lr", "5e-4", "--runs",
          "2" if quick else "3", "--epochs", "1" if quick else "5", "--out", at("finetune")],
         at("finetune", "report.html"), [], functools.partial(transfer_verdict, at)),
        ("8. Where backbones look", "Thesis 3.2.4: Grad-CAM, Vim beside ViT.",
         ["explain", "--images", tissue, "--weights", f"vit={at('dino_vit')},vim={at('dino_vim')}", "--most", "6",
          "--out", at("cam")], at("cam", "sheet.png"), [at("cam", "sheet.png")], None)]


def demo_bags(at, quick, heading, about, views):
    """Multiple-instance learning on each backbone's features of some views of the pictures."""
    return [(f"{heading}, {arch}", about,
             ["mil", "--data", at(f"bags_{views}{arch}.npz"), "--head", "abmil,clam_sb", "--epochs", "5" if quick else "50",
              "--min-epochs", "5", "--widths", "64", "--attention", "32", "--inner", "3", "--out", at(f"mil_{views}{arch}")],
             at(f"mil_{views}{arch}", "report.html"), [], functools.partial(mil_verdict, at, views) if arch == "vim" else None)
            for arch in ("vit", "vim")]


def demo_codes(at, quick, seed):
    """Chapters 4 and 5: sparse codes of one model and of all, concepts in pixels and words, retrieval."""
    feats, shared = at("feats.npz"), at("ablate", "global_lam1")
    code = ["--latents", "256", "--k", "16", "--batch", "128", "--lr", "1e-3", "--norm", "standard,l2", "--epochs",
            "4" if quick else "60"]
    stages = [(f"9. A sparse autoencoder of {s}", "Thesis 4.1.",
               ["sae", "--data", feats, "--stream", s, *code, "--out", at(f"sae_{s}")],
               at(f"sae_{s}", "report.html"), [], None)
              for s in ("dino_vit", "dino_vim")]
    stages += [
        ("10. One code for four models", "Thesis Tables 5.1, 5.2, 5.3, 5.5; sparc.txt 1-4, 14: the 2x2, both, random.",
         ["ablate", "--data", feats, "--taxonomy", at("tissue", "taxonomy.json"), *code, "--out", at("ablate")],
         at("ablate", "report.html"), [os.path.join(shared, "report.html")], functools.partial(ablate_verdict, at)),
        ("11. Latents in common", "Thesis 4.3: two autoencoders trained apart, beside one shared code.",
         ["compare", at("sae_dino_vit"), at("sae_dino_vim"), "--sparc", shared, "--json", at("compare.json")],
         at("compare.json"), [], functools.partial(compare_verdict, at))]
    for name, values in (("latents", "64,256,1024"), ("k", "4,16,64")):
        out = at(f"sweep_{name}")
        stages.append((f"12. More {name}", "Thesis 5.4.8, Fig. 5.8-5.9: what Global TopK costs and brings.",
                       ["sweep", "--over", f"{name}={values}", "--data", feats, *code, "--out", out],
                       os.path.join(out, "report.html"), [os.path.join(out, "sweep.svg")],
                       functools.partial(sweep_verdict, at, name)))
    small, both = at("small_clip"), f"dino_vit={at('dino_vit')},dino_vim={at('dino_vim')}"
    return stages + [
        ("13. Other sets of models: a second CLIP", "A smaller one, so that there are two text encoders.",
         ["clip", "--images", at("tissue", "tissue.npz"), "--width", "64", "--set", "layers=3 joint=48", "--epochs",
          "1" if quick else "20", "--out", small], os.path.join(small, "metrics.json"), [], None),
        ("13. Other sets of models: features", "Eight streams (as sparc.txt Table 6): two encoders of words alone among them.",
         ["extract", "--images", at("tissue", "tissue.npz"), "--weights",
          f"{both},clip={at('clip')},small={small},words=lsa:1,pairs=lsa:2", "--last", "1", "--out", at("eight.npz")],
         at("eight.npz"), [], None),
        ("13. Other sets of models", "sparc.txt Tables 7-13: across which models does Global reconstruct better?",
         ["sweep", "--over", "streams=" + ",".join(v for _, v in DEMO_SETS.values()), "--data", at("eight.npz"), *code,
          "--out", at("sweep_streams")], at("sweep_streams", "report.html"), [], functools.partial(sets_verdict, at)),
        ("14. Back to pixels and words", "Thesis 5.4.4, Table 5.4, A.3, A.4: heat maps of concepts, and what they segment.",
         ["explain", shared, "--images", at("tissue", "tissue.npz"), "--weights", f"{both},clip={at('clip')}",
          "--least", "20" if quick else "50", "--most", "40" if quick else "200", "--out", at("attribute")],
         at("attribute", "report.html"), [], None),
        ("14. The same under Local TopK", "Thesis Table 5.4: Local beside Global, the same pictures.",
         ["explain", at("ablate", "local_lam1"), "--images", at("tissue", "tissue.npz"), "--weights",
          f"dino_vit={at('dino_vit')},clip={at('clip')}", "--least", "20" if quick else "50",
          "--most", "40" if quick else "200", "--out", at("attribute_local")],
         at("attribute_local", "report.html"), [], functools.partial(attribute_verdict, at)),
        *((f"15. Retrieval, {run}", "Thesis Tables 5.6, 5.7, A.1-A.10: a vision-only backbone finds captions.",
           ["retrieve", at("ablate", f"{run}_lam1"), "--sample", "3", "--from", "dino_vit", "--to", "clip_txt", "--out",
            at(f"retrieve_{run}.html")], at(f"retrieve_{run}.html"), [], None) for run in ("global", "local")),
        ("15. Retrieval by words", "Thesis Fig. A.24-A.26: words that are no caption find pictures in that backbone.",
         ["retrieve", shared, "--query", "several tumour cells and a mitosis", "--encoder", at("clip"), "--from", "clip_txt",
          "--to", "dino_vit", "--out", at("words.html")], at("words.html"), [], None),
        ("15. Pictures from elsewhere", "Another tissue: other patients, slides and stains.",
         ["tissue", "--pictures", "40", "--out", at("elsewhere"), "--seed", str(seed + 1000)],
         at("elsewhere", "tissue.npz"), [], None),
        ("15. Pictures from elsewhere: features", "By the ViT alone.",
         ["extract", "--images", at("elsewhere", "tissue.npz"), "--weights", f"dino_vit={at('dino_vit')}", "--last", "1",
          "--out", at("elsewhere.npz")], at("elsewhere.npz"), [], None),
        ("15. Retrieval from elsewhere", "Thesis Tables A.11-A.17: captions for a picture that is not in the data set.",
         ["retrieve", shared, "--features", at("elsewhere.npz"), "--sample", "3", "--from", "dino_vit", "--to", "clip_txt",
          "--out", at("retrieve_elsewhere.html")], at("retrieve_elsewhere.html"), [], None)]


# sets of encoders of the kinds of sparc.txt's tables; those of text alone count words (latent semantic analysis)
DEMO_SETS = {"sparc 7": ("a CLIP's encoders", "clip_img+clip_txt"),
             "sparc 8": ("another CLIP's encoders", "small_img+small_txt"),
             "sparc 9": ("vision-only encoders", "dino_vit+dino_vim"),
             "sparc 10": ("text-only encoders", "words+pairs"),
             "sparc 11": ("image encoders", "clip_img+small_img+dino_vit+dino_vim"),
             "sparc 12": ("text encoders", "clip_txt+small_txt+words+pairs"),
             "sparc 13": ("all eight encoders", "clip_img+clip_txt+small_img+small_txt+dino_vit+dino_vim+words+pairs")}


def demo_latents(at, quick):
    """The medical papers: what latents are, do and keep."""
    tissue = at("tissue", "tissue.npz")
    weights = {"tuned": f"dino_vit={at('finetune', 'dino_vit.pt')}", "before": f"dino_vit={at('dino_vit')}"}
    about = "Mammo-SAE Fig. 2 and 4, Tables 1 and 2: tumour cells, their top latents kept or silenced, boxes around them, "
    return [
        ("16. What latents are: patients' barcodes", "CytoSAE Fig. 2A and 4.",
         ["latents", at("ablate", "global_lam1"), "--data", at("disease.npz"), "--stream", "dino_vit", "--between",
          "healthy,carcinoma", "--out", at("latents")], at("latents", "report.html"),
         [at("latents", "scatter.svg")], functools.partial(cyto_verdict, at)),
        *((f"17. What latents do, and where: patches, {when}", "Patches of the ViT that learned to find tumour cells "
           "(chapter 7, at half this size), and of what it was before.",
           ["extract", "--images", tissue, "--weights", spec, "--tokens", "--size", "64", "--out", at(f"tokens_{when}.npz")],
           at(f"tokens_{when}.npz"), [], None) for when, spec in weights.items()),
        ("17. What latents do, and where: the code", "One sparse autoencoder, of the fine-tuned patches, as in the paper.",
         ["sae", "--data", at("tokens_tuned.npz"), "--latents", "256", "--k", "8", "--batch", "1024", "--lr", "1e-3", "--norm",
          "standard", "--epochs", "1" if quick else "5", "--out", at("sae_tokens")],
         at("sae_tokens", "report.html"), [], None),
        ("17. What latents do, and where: before", about + "before fine-tuning.",
         ["intervene", at("sae_tokens"), "--data", at("tokens_before.npz"), "--label", "tumour cell", "--out",
          at("mammo_before")], at("mammo_before", "report.html"), [], None),
        ("17. What latents do, and where: fine-tuned", about + "after it, and their class means beside those before.",
         ["intervene", at("sae_tokens"), "--label", "tumour cell", "--other", at("tokens_before.npz"), "--out",
          at("mammo_tuned")], at("mammo_tuned", "report.html"), [], functools.partial(mammo_verdict, at)),
        ("18. A few latents suffice", "The TotalSegmentator study, for the vacuoles.",
         ["fidelity", at("sae_dino_vit"), "--label", "vacuoles", "--out", at("fidelity")],
         at("fidelity", "report.html"), [], functools.partial(fidelity_verdict, at))]


def read_metrics(path):
    return data.read_json(path)


def above(a, b):
    """Whether a > b, both of them there."""
    return a is not None and b is not None and a > b


def dino_verdict(at, arch):
    """No paper compares with random weights; we do."""
    with open(at(f"dino_{arch}", "log.csv"), newline="") as f:
        knn = [float(row["knn"]) for row in csv.DictReader(f) if row["knn"]]
    return ({("ours", f"20-NN, AUC, random {arch}"): knn[0], ("ours", f"20-NN, AUC, dino {arch}"): knn[-1]},
            {f"DINO finds better neighbours than random weights, {arch} (ours)": knn[-1] > knn[0]})


def probe_verdict(at):
    """Linear evaluation, also at half the magnification."""
    full, half = ({s: v["linear"]["AUC"] for s, v in read_metrics(at(f"{name}.json")).items()} for name in ("views", "half"))
    return ({**{("3.6", f"probe, AUC, {s}"): v for s, v in full.items()},
             **{("3.8", f"probe, half size, AUC, {s}"): v for s, v in half.items()}},
            {"Vim is ahead of ViT in linear evaluation, by AUC (3.6)": full["dino_vim"] > full["dino_vit"],
             "half the magnification is worse in linear evaluation, by AUC (3.8)": all(half[s] < full[s] for s in half),
             **{f"DINO is ahead of random weights in linear evaluation, {arch} (ours)":
                full[f"dino_{arch}"] > full[f"random_{arch}"] for arch in ("vit", "vim")}})


def mil_verdict(at, views):
    """Bags of Vim's features beside bags of ViT's; at half the magnification, beside the same weights at the full one."""
    found = {v: {f"{head}, {arch}": judge.mean_of([run["scores"] for run in runs], "AUC") for arch in ("vit", "vim")
                 for head, runs in read_metrics(at(f"mil_{v}{arch}", "metrics.json")).items()} for v in {"", views}}
    if not views:
        return ({("3.5", f"bags, AUC, {name}"): v for name, v in found[""].items()},
                {"Vim is ahead of ViT on bags, clam_sb (3.5)": above(found[""]["clam_sb, vim"], found[""]["clam_sb, vit"])})
    return ({("3.7", f"bags, half size, AUC, {name}"): v for name, v in found[views].items()},
            {f"half the magnification is worse on bags, clam_sb, {arch} (3.7)":
             above(found[""][f"clam_sb, {arch}"], found[views][f"clam_sb, {arch}"]) for arch in ("vit", "vim")})


def transfer_verdict(at):
    """Classifiers by their AUC and their size. The ViT that was pre-trained here is left out of the claim."""
    m, mambas = read_metrics(at("finetune", "metrics.json")), {"vim_micro", "vmamba_micro"}
    numbers = {("3.9-3.11", f"transfer, AUC, {name}"): judge.mean_of(runs, "AUC") for name, runs in m["scores"].items()}
    for name in m["scores"]:
        if os.path.exists(at("finetune", f"{name}.pt")):
            state = torch.load(at("finetune", f"{name}.pt"), weights_only=True)["model"]
            numbers["3.4", f"parameters, thousands, {name}"] = sum(
                v.numel() for key, v in state.items() if "running_" not in key and "num_batches" not in key) / 1000
    wins = {(a, b) for a, losers in judge.beaten(m["pairs"]["AUC"]).items() for b in losers if "dino_vit" not in (a, b)}
    return numbers, {"no Mamba is significantly beaten by another kind, in so few runs (3.9-3.11)":
                     not any(b in mambas and a not in mambas for a, b in wins)}


def ablate_verdict(at):
    """The 2x2: each way as it was trained (Global joint, Local alone), as published but for retrieval, which was alone; and
    what the joint numbers hide."""
    m = read_metrics(at("ablate", "metrics.json"))
    g, g0, null = m["global_lam1"], m["global_lam0"], m["global_lam1"]["null"]
    blocks = {"global, joint": g["joint"], "its null": null["joint"], "global, alone": g["alone"],
              "its null, alone": null["alone"], "global, λ 0, joint": g0["joint"], "global, λ 0, alone": g0["alone"],
              "local": m["local_lam1"]["alone"], "local, λ 0": m["local_lam0"]["alone"],
              "both, alone": m["both_lam1"]["alone"]}
    head = {name: judge.headline(block) for name, block in blocks.items()}
    wanted = (("5.1", "mixed: alive in some, %"), ("5.2", "Jaccard, other latents as 0"), ("5.2", "Jaccard of top-50 labels"),
              ("5.3", "1-D probe loss (chance 0.693)"), ("5.5", "retrieval R@1"), ("sparc 3", "R2 cross"))
    numbers = {(table, f"{what}; {name}"): one.get(what) for table, what in wanted for name, one in head.items()}
    mixed, alike, _, loss, found, cross = ({name: one.get(what) for name, one in head.items()} for _, what in wanted)
    loss = {name: None if v is None else -v for name, v in loss.items()}
    return numbers, {
        "under Global TopK all streams choose the same latents, joint: those mixed are ReLU's zeros (5.1)": same_choice(at),
        "under Global TopK less than 1 % of the latents are mixed, joint (5.1)": above(1, mixed["global, joint"]),
        "fewer latents are mixed under Global than under Local, alone (ours)": above(mixed["local"], mixed["global, alone"]),
        "Global has a higher Jaccard than Local, as trained (5.2)": above(alike["global, joint"], alike["local"]),
        "λ = 1 has a higher Jaccard than λ = 0, Global and Local (5.2)":
        above(alike["global, joint"], alike["global, λ 0, joint"]) and above(alike["local"], alike["local, λ 0"]),
        "Global has a higher Jaccard than Local, alone (ours)": above(alike["global, alone"], alike["local"]),
        "Global has a higher Jaccard than for shuffled pairs, joint (ours)": above(alike["global, joint"], alike["its null"]),
        "1-D probes do better under Local, as trained (5.3)": above(loss["local"], loss["global, joint"]),
        "1-D probes do better at λ = 0, Global (5.3)": above(loss["global, λ 0, joint"], loss["global, joint"]),
        "Global retrieves better than Local, alone (5.5)": above(found["global, alone"], found["local"]),
        "λ = 1 retrieves better than λ = 0, alone, Global and Local (5.5)":
        above(found["global, alone"], found["global, λ 0, alone"]) and above(found["local"], found["local, λ 0"]),
        "Global retrieves better than for shuffled pairs, alone (ours)":
        above(found["global, alone"], found["its null, alone"]),
        "Global reconstructs across streams better than Local, as trained (sparc 3)":
        above(cross["global, joint"], cross["local"]),
        "Global reconstructs across streams better than Local, alone (ours)": above(cross["global, alone"], cross["local"])}


def same_choice(at, mode="joint"):
    """Whether the codes of 200 samples have the same indices in every stream: a theorem of joint ones, here looked at."""
    model, _, _ = sae.load(at("ablate", "global_lam1", "checkpoint.pt"))
    features = data.read_features(at("feats.npz"))
    with torch.no_grad():
        codes = list(model.encode(features.batch(features.rows("test", "val")[:200]), mode).values())
    return all(torch.equal(code.indices, codes[0].indices) for code in codes)


def compare_verdict(at):
    """Two autoencoders trained apart, and one shared code: how many of their pairs of latents correlate at 0.5 or more?"""
    rows = read_metrics(at("compare.json"))
    apart, shared = (rows[name]["shared, %"] for name in ("the two runs, best pairing", "SPARC alone, same latent"))
    return ({("4.3", "pairs in common, %, trained apart"): apart, ("4.3", "pairs in common, %, one code, alone"): shared},
            {"one code has more in common than two trained apart, alone (4.3)": shared > apart})


def sweep_verdict(at, name):
    """Figures 5.8 and 5.9; the rows are as cmd_sweep's header says."""
    rows, label = read_metrics(at(f"sweep_{name}", "metrics.json"))["rows"], {"latents": "number of latents"}.get(name, name)
    return ({("5.8-5.9", f"NMSE, {name} {row[0]}, {what}"): row[i] for row in rows for i, what in (
                (1, "self, global, joint"), (2, "self, local"), (4, "cross, global, joint"), (5, "cross, local"),
                (8, "cross, global, alone"))},
            {f"Global costs self reconstruction at every {label}, joint (5.8)": all(above(row[3], 0) for row in rows),
             f"Global brings cross reconstruction at every {label}, joint (5.8)": all(above(0, row[6]) for row in rows),
             f"Global brings cross reconstruction at every {label}, alone (ours)": all(above(row[5], row[8]) for row in rows)})


def sets_verdict(at):
    """Across which sets of models does Global reconstruct better than Local? In the paper across all but texts, where it is
    so without pictures (Table 10) and mostly so with them (12)."""
    numbers, claims, everywhere = {}, {}, True
    for table, (kind, streams) in DEMO_SETS.items():
        one = {topk: read_metrics(at("sweep_streams", f"streams_{streams}_{topk}", "metrics.json"))
               for topk in ("global", "local")}
        r2 = {f"{topk}, {mode}": judge.headline(one[topk][mode])["R2 cross"] for topk, mode in (
            ("global", "joint"), ("local", "alone"), ("global", "alone"))}
        numbers.update({(table, f"R2, cross, {kind}, {way}"): v for way, v in r2.items()})
        better, worse = ("local, alone", "global, joint")[::1 if table in ("sparc 10", "sparc 12") else -1]
        winner = better.split(",")[0].title()
        claims[f"{winner} reconstructs better across {kind}, as trained ({table})"] = above(r2[better], r2[worse])
        everywhere &= above(r2["global, alone"], r2["local, alone"])
    return numbers, {**claims, "Global reconstructs better across every set, alone (ours)": everywhere}


def attribute_verdict(at):
    """Each target beside as many random latents of the same code, Global beside Local, and CLIP's own similarity."""
    found = {way: read_metrics(at(f"attribute{way}", "metrics.json"))["segmentation"] for way in ("", "_local")}
    m, local = ({name: v["mIoU"] for name, v in one.items()} for one in found.values())
    raw, claims = m["clip, raw similarity"], {}
    for name in m:
        backbone, _, target = name.partition(", ")
        if target and target not in ("random latents", "raw similarity"):
            claims[f"{name}: better than random latents (ours)"] = above(m[name], m[f"{backbone}, random latents"])
    for backbone in ("dino_vit", "clip"):
        for target in ("sum of concept latents", "similarity to the name"):
            claims[f"Global segments better than Local: {backbone}, {target} (5.4)"] = above(
                m[f"{backbone}, {target}"], local[f"{backbone}, {target}"])
    scored = [v for one in found.values() for v in one.values() if "absent" in v]
    return ({**{("5.4", f"mIoU, {name}"): v for name, v in m.items()},
             **{("5.4", f"mIoU, Local; {name}"): v for name, v in local.items() if name not in ("clip, raw similarity",
                                                                                             "centre of the picture")}},
            {**claims, "names guide the vision-only ViT to nine tenths of CLIP's similarity (5.4)":
             above(m["dino_vit, similarity to the name"], 0.9 * raw),
             **{f"concept latents draw what is absent less often than similarity does, {b} (A.3.3)": above(
                 *(found[""][f"{b}, {target}"]["drawn though absent, %"] for target in (
                     "similarity to the name", "sum of concept latents"))) for b in ("dino_vit", "clip")},
             "a score of 0 has a map of zeros (ours, a theorem)":
             sum(v["absent"] for v in scored) > 0 and not any(v["maps of absent that are not 0"] for v in scored)})


def cyto_verdict(at):
    """Diseases from barcodes of the latents with a mean activation of 0.001 or more, as in the paper."""
    f1 = judge.mean_of(read_metrics(at("latents", "metrics.json"))["barcodes"].get("f1", {}).get("-3", {"f1": []})["f1"])
    return ({("CytoSAE 4", "barcodes, weighted F1"): f1},
            {"barcodes tell diseases better than guessing (ours, of CytoSAE 4)": above(f1, 1 / len(data.DISEASES))})


def mammo_verdict(at):
    """One code, learned from the patches of the fine-tuned ViT, for it and for the ViT as DINO left it. Interventions on the
    union of both classes' top latents; class means on training samples; single latents as detectors of boxes."""
    runs = {when: read_metrics(at(f"mammo_{when}", "metrics.json")) for when in ("tuned", "before")}
    tuned = runs["tuned"]
    ten = max((c for c in tuned["curve"] if c["k"] <= 10), key=lambda c: c["k"])
    auc = {when: [m["auc"][name][0] for name in ("original features", "reconstructed")] for when, m in runs.items()}
    ap = {when: judge.mean_of(m["localisation"], "ap") for when, m in runs.items()}
    near = [tuned[key]["cosine"] for key in ("separation", "separation of --other")]
    more = auc["tuned"][1] - 0.5                             # than chance
    return ({**{("Mammo 1", f"AUC, {what}, {when}"): v for when, both in auc.items()
                for what, v in zip(("features", "reconstructed"), both)},
             ("Mammo Fig. 2", "AUC, top ten of each class kept"): ten["keep"],
             ("Mammo Fig. 2", "AUC, top ten silenced"): ten["silence"],
             **{("Mammo 2", f"AP, mean of the top ten latents, {when}"): v for when, v in ap.items()},
             **{("Mammo 2", f"AP, the best of them on test pictures, {when}"): max(row["ap"] for row in m["localisation"])
                for when, m in runs.items()},
             ("Mammo Fig. 4", "cosine of class means, tuned"): near[0],
             ("Mammo Fig. 4", "cosine of class means, before"): near[1]},
            {"fine-tuned features tell the label better (Mammo Table 1)": auc["tuned"][0] > auc["before"][0],
             "the reconstruction's AUC is within 0.025 of the features', either way (Mammo Table 1)":
             all(abs(x - y) <= 0.025 for x, y in auc.values()),
             "ten latents of each class keep nine tenths of it, beyond chance (Mammo Fig. 2a)":
             more > 0.05 and ten["keep"] - 0.5 >= 0.9 * more,
             "silencing these leaves at most half of it (Mammo Fig. 2b)": more > 0.05 and ten["silence"] - 0.5 <= 0.5 * more,
             "fine-tuned latents find the boxes better (Mammo Table 2)": above(ap["tuned"], ap["before"]),
             "fine-tuning moves the class means apart, by cosine (Mammo Fig. 4)": near[0] < near[1]})


def fidelity_verdict(at):
    """How much ten latents keep, beside ten principal components."""
    m = read_metrics(at("fidelity", "metrics.json"))
    ten = next(row for row in m["kept"]["rows"] if row["n"] == 10)
    near = next(row for row in m["neighbours"] if row["k"] == 10)
    return ({("TotalSegmentator", what): v for what, v in (
                ("R2", m["r2"]["variance-weighted"]), ("probe, ten latents", ten["best latents"]),
                ("probe, ten components", ten["principal components"]), ("probe, all features", m["kept"]["dense"]),
                ("kept by ten latents, %", percent(ten["kept"])),
                ("overlap of 10 neighbours", near["overlap"]))},
            {"ten latents keep 87.8 % of the probe, beyond chance (TotalSegmentator)":
             m["kept"]["dense"] - m["kept"]["chance"] > 0.05 and ten["kept"] >= 0.878,
             "ten latents keep more than ten principal components (ours)": ten["best latents"] > ten["principal components"]})


def demo_files(out, seed):
    """Files that tie stages together: patients as bags and as slides; features with the disease as label."""
    views = {views: data.read_arrays(os.path.join(out, name)) for views, name in (("", "feats.npz"), ("half_", "half.npz"))
             if not views or os.path.exists(os.path.join(out, name))}
    feats, made = views[""], data.read_arrays(os.path.join(out, "tissue/tissue.npz"))
    order = np.argsort(made["groups"], kind="stable")
    _, first, count = np.unique(made["groups"], return_index=True, return_counts=True)
    y = made["disease"][first]
    folds = np.ones((1, 5, len(y)), bool)                    # True: to learn from
    for fold, part in zip(folds[0], data.stratified_parts(y, [1] * 5, seed)):
        fold[part] = False
    about = {"y": y, "offsets": np.r_[0, np.cumsum(count)], "folds": folds}
    for arch in ("vit", "vim"):
        for name, x in views.items():
            x = x[f"dino_{arch}"][order].astype(np.float32)
            judge.write_npz(os.path.join(out, f"bags_{name}{arch}.npz"), {"X": x, **about})
    demo_slides(out, feats["dino_vim"], made)
    keep = {k: v for k, v in feats.items() if k not in ("labels", "label_names", "boxes")}
    judge.write_npz(os.path.join(out, "disease.npz"), {**keep, "labels": made["disease"], "label_names": made["disease_names"]})


def demo_slides(out, x, made):
    """A patient's pictures in rows of four as a slide, and a file of their features beside it, in a folder of each disease."""
    for disease in made["disease_names"]:
        os.makedirs(os.path.join(out, "slides", str(disease)), exist_ok=True)
    for group in np.unique(made["groups"]):
        rows = np.flatnonzero(made["groups"] == group)
        folder = os.path.join(out, "slides", str(made["disease_names"][made["disease"][rows[0]]]))
        tiles = [Image.open(os.path.join(out, "tissue", str(made["images"][row]))) for row in rows]
        side = tiles[0].size[0]
        places = [(n % 4 * side, n // 4 * side) for n in range(len(rows))]
        slide = Image.new("RGB", (4 * side, places[-1][1] + side), "white")
        for tile, place in zip(tiles, places):
            slide.paste(tile, place)
        judge.save_picture(os.path.join(folder, f"{group}.png"), slide)
        judge.write_npz(os.path.join(folder, f"{group}.npz"), {
            "dino_vim": x[rows], "images": np.array([f"{group}.png"] * len(rows)),
            "coords": np.array([(*place, side, side) for place in places])})


@command("seed=0 seeds skip quick out=demo")
def cmd_demo(flags):
    """The whole thesis on a laptop, on made-up tissue: every stage is a command of its own, and the end is one report."""
    out, seeds = os.path.normpath(flags.out), range(flags.seed, flags.seed + flags.seeds)
    folders = [out if flags.seeds == 1 else os.path.join(out, f"seed{seed}") for seed in seeds]
    skip = number_list(flags.skip) if flags.skip else ()
    numbers, claims, sections = zip(*(run_demo(folder, flags.quick, seed, skip) for folder, seed in zip(folders, seeds)))
    values = {key: [one.get(key) for one in numbers] for key in numbers[0]}
    held = {claim: sum(one[claim] for one in claims) for claim in claims[0] if all(claim in one for one in claims)}
    S = len(seeds)
    rows = [[f"{table}: {what}", judge.mean_std(v) if S > 1 else v[0]] for (table, what), v in values.items()]
    tables = [(["papers' table: what is here", f"mean ± std, {S} seeds" if S > 1 else f"seed {flags.seed}"], rows),
              (["what the papers find, and we ask", "so it is here"],
               [[claim, f"in {n} of {S} seeds" if S > 1 else "yes" if n else "no"] for claim, n in held.items()])]
    for table in tables:
        print("\n" + judge.text_table(*table))
    judge.write_json(os.path.join(out, "findings.json"), {
        "numbers": {f"{table}: {what}": v for (table, what), v in values.items()}, "claims": held, "seeds": S})
    page = [("The papers' tables, here", "".join(judge.html_table(*table) for table in reversed(tables))), *sections[0],
            ("How far to trust it", "<p>Made-up pictures, models of a few hundred thousand weights trained for minutes: "
             "trends, not figures." + f" The stages shown are those of seed {flags.seed}." * (S > 1)
             + " --quick shows the mechanics alone." * flags.quick + "</p>")]
    judge.write_report(os.path.join(out, "report.html"), "repsae demo: the thesis on made-up tissue", page)
    say(f"wrote {os.path.join(out, 'report.html')}")


def run_demo(out, quick, seed, skip=()):
    """Run what is not done yet, but for the chapters to skip: (numbers and claims of the verdicts, sections of the report)."""
    os.makedirs(out, exist_ok=True)
    numbers, claims, sections, stages, stale = {}, {}, [], demo_stages(out, quick, seed), False
    files = [os.path.join(out, f"stage_{n:02d}.txt") for n in range(1, len(stages) + 1)]
    for n, (told, (heading, stands_for, argv, proof, pictures, verdict)) in enumerate(zip(files, stages)):
        if int(heading.split(".")[0]) in skip:
            sections.append((heading, "<p>Skipped.</p>"))
            continue
        command = f"python repsae.py {shlex.join(argv)}"
        if not stale and (not os.path.exists(proof) or read_text(told).split("\n", 1)[0] != command):
            stale = True                                     # and with it all that comes after, now or in a later call
            for later in filter(os.path.exists, files[n:]):
                os.remove(later)
        if stale:
            say(f"== {heading}: {command}")
            if argv[0] in ("mil", "latents"):
                demo_files(out, seed)
            run_stage(argv, command, told)
        text = read_text(told).split("\n", 1)[1]
        report = os.path.join(os.path.dirname(proof), "report.html") if os.path.dirname(proof) != out else proof
        shown = "".join(inlined(path) for path in dict.fromkeys([*pictures, report]) if os.path.exists(path))
        if verdict:
            try:
                more, found = verdict()
            except FileNotFoundError:                        # what it compares with was skipped
                if not skip:
                    raise
                more, found = {}, {}
            numbers.update(more)
            claims.update(found)
            shown = judge.html_table(["what the papers find, and we ask", "so it is here"], [
                [claim, "yes" if so else "no"] for claim, so in found.items()]) * bool(found) + shown
        sections.append((heading, f"<p>{html.escape(stands_for)}</p><p><code>{html.escape(command)}</code></p>"
                         f"<pre>{html.escape(text)}</pre>{shown}"))
    return numbers, claims, sections


def read_text(path):
    """A file's text, or "" where there is none."""
    if not os.path.exists(path):
        return ""
    with open(path) as f:
        return f.read()


def run_stage(argv, command, told):
    """Run one command; what it printed goes to the file `told`. One that was begun and stopped is resumed, if it can be."""
    begun, printed = f"{told}.begun", io.StringIO()
    table = COMMANDS[argv[0]].flags
    again = ["--resume"] if "resume" in table and read_text(begun) == command else ["--overwrite"] * ("overwrite" in table)
    judge.write_text(begun, command)
    try:
        with contextlib.redirect_stdout(printed):
            run, one = parse([*argv, *again])
            run(one)
    except Interrupted as e:
        say(f"\n{e}; the same demo command goes on from there")
        raise SystemExit(130)
    print(printed.getvalue(), end="", flush=True)
    judge.write_text(told, f"{command}\n{printed.getvalue()}")
    os.remove(begun)


def inlined(path):
    """A picture, a chart or the body of a stage's own report (folded), in HTML; nothing for other files."""
    if path.endswith((".svg", ".html")):
        with open(path) as f:
            text = re.sub("<style>.*?</style>", "", f.read(), flags=re.S)
        if path.endswith(".svg"):
            return text
        body = text[text.index("<main>") + 6:text.index("</main>")]
        return f"<details><summary>{html.escape(path)}</summary>{body}</details>"
    if not path.endswith(".png"):
        return ""
    with Image.open(path) as image:
        return judge.embedded(image, 900)


# ------------------------------------------------------------------------------------------------
# Commands of the machine
# ------------------------------------------------------------------------------------------------

@command("json svg device", "what")
def cmd_bench(flags):
    """Speed and memory: `sparc` (a training step), `rows` (large memory-mapped folders), `scan` and `backbones`."""
    for name in ("svg", "json"):
        if flags[name] and not os.path.isdir(os.path.dirname(flags[name]) or "."):
            raise InputError(f"--{name} {flags[name]}: no such folder - make it first")
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests", "bench.py")
    files = [f"--{name}={flags[name]}" for name in ("svg", "json") if flags[name]]
    raise SystemExit(subprocess.run([sys.executable, script, flags.what, f"--device={flags.device}", *files]).returncode)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------

class Flags(dict):
    """The settings of a command by name, readable as attributes. `given` holds those that the user typed."""
    given = frozenset()

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name)

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
    """argv -> (command function, Flags). Only what was typed comes out of argparse, not defaults."""
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
    for name in sorted(each.needed):
        if not flags[name.replace("-", "_")] and not flags.get("resume"):
            fail(f"--{name} is missing - see python repsae.py {flags.command} --help")
    return each.run, flags


def add_command(subs, name, each):
    """A sub-command's parser, its help in groups."""
    settings = [f"{flag}={default}  {SETTINGS[flag][2]}"
                for flag, default in each.flags.items() if flag in SETTINGS]
    sub = subs.add_parser(
        name, help=each.run.__doc__.split("\n")[0], description=each.run.__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
            default, kind, text = each.flags.get(flag), *FLAGS[flag][1:]
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
    """--set "aux-k=32 clip=1" -> {"aux_k": 32, "clip": 1.}; fails on what the command does not have."""
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
        raise InputError(f"device '{flags.device}' cannot be used ({str(e).splitlines()[0][:60]}...) - try cpu")


def say(text):
    """A line for the user on stderr: results alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


@functools.cache
def say_once(text):
    """`say`, but the same line only once in a process."""
    say(text)


def fail(text):
    """End as every user error does: one line of at most 400 characters, exit code 2. Of a longer one the middle goes, since
    its end says what to do."""
    line = " ".join("".join(c if c.isprintable() else " " for c in f"repsae: error: {text}").split())
    say(line if len(line) <= 400 else f"{line[:260]} ... {line[-130:]}")
    raise SystemExit(2)


def main(argv=None):
    """Run the command that argv names. What a user can mend ends in `fail`; bugs of ours keep their traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")    # names of files need not be text
    try:
        run, flags = parse(argv)
        if "device" in flags:
            check_device(flags)
        run(flags)
    except Interrupted as e:
        say(f"\n{e}; go on with: python repsae.py {flags.command} --resume --out {shlex.quote(flags.out)}")
        raise SystemExit(130)
    except KeyboardInterrupt:
        raise SystemExit(130)
    except MemoryError:
        fail("there is not enough memory for this - lower the sizes, or take fewer samples or pictures")
    except OSError as e:                                     # no space, no permission, no such place
        fail(f"{e.strerror or e}: {e.filename or flags.get('out')} - mend it, or name another place")
    except ValueError as e:
        if type(e).__name__ != "InputError":
            raise
        fail(e)
    finally:
        Run.release()


if __name__ == "__main__":
    main()
