"""repsae: the command line, and the only module that knows the others.

    python repsae.py sparc                      SPARC on pictures of drawn tissue
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
import contextlib
import csv
import fcntl
import functools
import glob
import importlib
import inspect
import io
import itertools
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings


class Late:
    """A module that is imported when something of it is first used: --help needs no torch."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, what):
        return getattr(importlib.import_module(self._name), what)


data, judge, sae, ssm = Late("data"), Late("eval"), Late("sae"), Late("ssm")
np, scipy, torch = Late("numpy"), Late("scipy"), Late("torch")
Image = Late("PIL.Image")


class InputError(ValueError):
    """What the caller can mend. Each room raises its own; `main` knows them by name."""


def refuse(when, why):
    """Raise InputError(why) where `when` holds; `why` is made in any case."""
    if when:
        raise InputError(why)


# ---- Every flag, once ---------------------------------------------------------------------------

class Flags(dict):
    """The settings of a command by name, readable as attributes."""
    given = frozenset()                                      # names of those that were typed

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def pick(self, names):
        """Those of `names`, "lr batch", as keyword arguments."""
        return {name: self[name] for name in names.split()}

    def replaced(self, changes):
        new = Flags({**self, **changes})
        new.given = self.given
        return new


def value_of(kind, text, said, default=None):
    """The value of a kind that `text` means, whoever says so: a command line, a config.json, a
    command's own defaults. InputError begins with what was `said`."""
    number, _, ends = kind.partition(" ")
    refuse(kind == "numbers" and not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text),
           f"{said} - give positive whole numbers, separated by commas")
    if kind in ("text", "path", "file", "numbers") or text == default == "auto":
        return text
    if number in ("int", "float", "pair"):
        least, _, most = ends.partition("..")
        least, most = float(least or 0), float(most or 1e6)
        with contextlib.suppress(ValueError, OverflowError):
            if number == "pair":                             # "[0.4, 1.0]" is that of a config.json
                low, high = map(float, text.strip("[]").split(","))
                if least <= low < high <= most:
                    return [low, high]
            value = int(text) if number == "int" else float(text)
            if least <= value <= most:                       # NaN is in no range
                return value
        name = {"int": "a whole number", "pair": "two numbers in order"}.get(number, "a number")
        raise InputError(f"{said} - give {name} from {least:.10g} to {most:.10g}")
    switch = {"no": False, "yes": True, "False": False, "True": True}
    choices = switch if kind == "switch" else {choice: choice for choice in kind.split("|")}
    refuse(text not in choices, f"{said} - take one of {', '.join(choices)}")
    return choices[text]


# name: (default, kind, help). A kind is "text", "path" (of what is read), "file" (that is written),
# "numbers" (a,b,c), "switch", "settings", choices "a|b", or "int", "float" or "pair" (of numbers
# a,b) with a range, 0..1e6 where none is given. What is None or "auto" is open: who uses it fills
# it in, and "auto" can be typed where it is the default.
WHAT = {
    "data": (None, "path", "features, .npz or folder of .npy (mil: bags); else the run's, --world"),
    "world": ("tissue", "tissue|planted", "made up without --data: pictures, or planted concepts"),
    "streams": (None, "text", "names of the streams to use, a,b,c; all by default"),
    "stream": (None, "text", "the one stream to use, where there are several"),
    "taxonomy": (None, "path", 'JSON, {"child": "parent", "root": null} or as in Open Images'),
    "images": (None, "path", "pictures: a folder, of class or of train, val, test folders, an "
               ".npz of MedMNIST's kind or of `tissue`; tile: a slide or a folder of them"),
    "weights": (None, "path", "models a,b: name=RUN of dino or clip, name=FILE.pt of finetune, "
                "name=arch:FILE, name=arch:random, an arch alone (arch@16@384: patch, size); "
                "name=lsa:N reads captions by runs of N words; clip: a file of released weights"),
    "label": (None, "text", "the label in question, by name or number"),
    "window": (None, "pair -1e9..1e9", "grey values shown black and white (--window=-1000,400)"),
    "mode": ("alone", "alone|joint", "each stream chooses its latents, or all together"),
    "over": (None, "text", 'the grid: "topk=global,local lam=0,1", streams=a+b,a+b+c'),
    "other": (None, "path", "features of the same samples by another backbone, to set beside"),
    "sparc": (None, "path", "a run of sparc on both streams, to set beside"),
    "split": ("random", "random|given", "70 / 15 / 15 drawn anew each run, or the file's"),
    "only": (None, "text", "labels a,b to tell apart, or to find one by one; all by default"),
    "between": (None, "text", "two labels a,b: which latents tell their groups apart?"),
    "query": (None, "text", "words to search by; explain: several, a,b, to look for"),
    "names": (None, "path", 'JSON of names of latents, {"17": "round nucleus"}'),
    "prompts": (None, "file", "file to write: samples of every latent, and a prompt for its name"),
    "sample": (0, "int 0..1e9", "number of the test sample that asks"),
    "token": (None, "int 0..1e9", "its patch, from 0, row by row: what is in it, and where else?"),
    "from": (None, "text", "its stream; the first by default"),
    "to": (None, "text", "the stream to search; the last by default"),
    "features": (None, "path", "another file, whose row --sample asks"),
    "encoder": (None, "path", "run of clip whose text encoder reads --query"),
    "latent": (None, "text", "latents to show, 3,17; else some of labels, alive everywhere"),
    "merges": (None, "path", "CLIP's merges file; else words of the captions are the tokens"),
    "voc": (None, "path", "Pascal VOC folder, whose boxes become the pictures"),
    "rois": (None, "path", "ASAP annotations, an XML or a folder of NAME.xml: label tiles by them"),
    "pictures": (4000, "int 8..", "how many to draw"),
    "most": (12, "int 1..", "pictures at most"),
    "least": (50, "int", "training samples of a label a latent needs to be one of its own"),
    "top": (10, "int 1..", "samples that show what a latent is, or that a search finds"),
    "seeds": (1, "int 1..1000", "how often, from --seed on, for means and deviations"),
    "controls": (False, "switch", "also an encoder, and a dictionary, that stay as they began"),
    "runs": (5, "int 1..1000", "seeds"),
    "bootstrap": (0, "int 2..10000", "draws of test samples, or groups, for intervals"),
    "quick": (False, "switch", "a size at which only the mechanics count, in minutes"),
}
MODEL = {
    "preset": (None, "thesis|mammo|cyto", "the thesis's; sae: of thesis 4.1, Mammo-SAE or CytoSAE"),
    "latents": ("auto", "int 1..16777216", "L, width of the code; auto: by the rows"),
    "k": ("auto", "int 1..", "latents kept per sample; auto: an eighth of L, 40 to 64"),
    "topk": ("global", "global|local|both|random", "who chooses them in training: all streams "
             "together, each for itself, both (ours), one stream drawn a step (Universal SAE)"),
    "lam": (1.0, "float", "weight of cross reconstruction (thesis Eq. 14)"),
    "targets": ("auto", "int 1..", "others that a code rebuilds a step; auto: all up to 4, then 2"),
    "loss": ("sum", "sum|mean", "over streams: Eq. 14, or as the authors' code averages"),
    "norm": ("auto", "l2|standard|standard,l2|none", "length 1; mean 0, deviation 1; both (auto)"),
    "dead-after": ("auto", "int 1..1e9", "steps without firing; auto: 1000, or a quarter"),
    "activation": (None, "text", "topk (usual), relu, jumprelu, batchtopk, matryoshka, or all"),
    "sparsity": (None, "float", "lambda of L1 (relu: 0.1) or L0 (jumprelu: 0.01), for length 1"),
    "error": (None, "nmse|sum|mean", "squared, over ||x||^2; summed over d as papers write; its "
              "mean: lambda_paper = d * lambda_code"),
    "revive": (None, "none|auxk|ghost|resample", "what is done about dead latents"),
    "bias": (None, "zeros|mean|median", "start of the decoder's bias"),
    "null": ("auto", "switch", "once more, with shuffled rows; auto: if under a minute"),
    "arch": ("vim_small", "text", "backbone: a preset of ssm.py"),
    "patch": (None, "int 1..2048", "patch size, where not the preset's"),
    "size": (None, "int 1..8192", "side of pictures or of DINO's global crops, pixels"),
    "width": (96, "int 1..1e5", "of both of CLIP's transformers"),
    "prototypes": (65536, "int 2..", "K, outputs of DINO's head"),
    "head-hidden": (2048, "int 1..1e5", "width of DINO's head"),
    "head": ("gated", "text", "of a bag: max, mean, abmil, gated, clam_sb, clam_mb, or several"),
    "widths": ("512", "numbers", "of the layers that embed an instance, a,b"),
    "attention": (256, "int 1..1e5", "hidden width of the attention"),
    "instances": (8, "int 1..", "CLAM: instances called positive, and as many negative"),
    "dropout": (0.25, "float 0..0.99", "after the embedding; CLAM: in the attention too"),
    "standardise": (False, "switch", "random weights start in the pictures' own units (ours)"),
    "last": (1, "int 1..1000", "ViT: class tokens of so many last blocks; --tokens: of that one"),
    "tokens": (False, "switch", "patch tokens (N, T, d), in half precision, not the class token"),
    "whole": (False, "switch", "squeeze pictures to a square instead of cutting their middle out"),
    "tau": (0.0, "float", "activation above which a patch counts (CytoSAE Eq. 3; barcodes .2)"),
    "weighted": (False, "switch", "entropy weighted by activation, as CytoSAE's code has it"),
    "iou": (0.25, "float 1e-9..1", "overlap with a true box that makes a box right"),
    "downsample": (1.0, "float 1e-9..", "pixels of the slide in one of the tile's"),
    "threshold": (8, "int 0..255", "saturation above which a pixel is tissue"),
    "smallest": (0.2, "float", "smallest piece of tissue, in areas of 512 x 512 pixels"),
}
TRAINING = {
    "epochs": ("auto", "int 1..", "passes at most; auto: 50"),
    "batch": ("auto", "int 1..", "samples a step; auto: a tenth of the rows, up to 256"),
    "lr": ("auto", "float 1e-12..1e30", "auto: 2e-4 sqrt(2^14 / L); dino: at batch 256"),
    "warmup": (None, "int", "steps over which the learning rate rises; dino: epochs"),
    "weight-decay": (0.0, "float", "L2 penalty, or AdamW's decay; dino: at the start"),
    "shuffle": ("auto", "blocks|samples", "samples singly, or blocks of a batch (mapped folders)"),
    "patience": (20, "int 1..", "epochs without a better validation loss that end training"),
    "min-epochs": (50, "int", "epochs that are trained in any case"),
    "momentum": (0.996, "float 0..1", "of DINO's teacher at the start; 1 at the end"),
    "local-size": (96, "int 1..8192", "side of DINO's local crops"),
    "local-crops": (8, "int 0..100", "their number"),
    "local-scale": ([0.05, 0.4], "pair 0..1", "share of the area that they cover, from,to"),
    "global-scale": ([0.4, 1.], "pair 0..1", "the same of global crops"),
    "blur": (2.0, "float 0..100", "largest radius of the blur, pixels; less for small pictures"),
    "colour": (1.0, "float 0..2", "strength of colour changes; less where colour matters"),
    "balanced": (False, "switch", "classes equally often: bags drawn so, or pictures left out"),
    "folds": (0, "int 0..1000", "parts of all bags, in turn; 0: the file's, or 70 / 15 / 15"),
    "votes": (1, "int 1..1000", "models that vote on a bag, each from its own weights"),
    "seed": (42, "int 0..4294967295", "of everything drawn: split, weights, order, pictures"),
}
RUN = {
    "out": (None, "text", "where to write; a folder inside the run by default"),
    "json": (None, "file", "file for every figure"),
    "export": (None, "text", "folder for each stream's alone code, as SAELens 6 reads it"),
    "device": ("cpu", "text", "torch device"),
    "workers": (2, "int 0..256", "processes that make crops"),
    "eval-rows": (10000, "int 0..1e9", "samples judged, of test, else of val; 0: all"),
    "log-every": (20, "int 1..", "steps between rows of log.csv"),
    "save-every": (60.0, "float", "seconds between checkpoints"),
    "overwrite": (False, "switch", "replace what an earlier run wrote there, and nothing else"),
    "resume": (False, "switch", "go on where the run there stopped, or start it"),
    "set": (None, "settings", 'settings of a reproduction, "name=value name=value": see below'),
}
# Constants of papers, which --set alone reaches.
SETTINGS = {
    "aux-k": (64, "int 1..", "dead latents that rebuild the residual (AuxK)"),
    "aux-coef": (1 / 32, "float", "weight of AuxK; 0 for none"),
    "reinit-after": (1000, "int 0..1e9", "dead for so long, a latent is drawn anew (authors: 0)"),
    "start": (None, "float 1e-6..1e3", "of encoder rows: times the authors' length, 1/3"),
    "expansion": (None, "int 1..", "L over the stream's width, instead of --latents"),
    "bandwidth": (None, "float 1e-12..", "jumprelu: epsilon of the threshold's gradient, 0.1"),
    "bottleneck": (256, "int 1..1e5", "DINO's head: width of its last layer"),
    "teacher-temp": (0.04, "float 1e-6..", "DINO: of the teacher"),
    "warmup-start": (0.0, "float 0..1e30", "DINO: learning rate at the first step"),
    "decay-ssm": (False, "switch", "DINO: decay state-space parameters too (the authors' run)"),
    "layers": (4, "int 1..1000", "CLIP: of both transformers"),
    "joint": (64, "int 1..1e5", "CLIP: width of the common space"),
    "context": (32, "int 3..10000", "CLIP: longest text, tokens"),
    "subtyping": (False, "switch", "CLAM: classes exclude each other"),
    "class-token": (False, "switch", "patch tokens after the class token, no grid"),
    "noisy": (10.0, "float", "--token: times the average latent's share of patches, what is noise"),
    "cosine": (False, "switch", "MIL: the learning rate falls to 0 along half a cosine"),
}
GROUPS = {"what": WHAT, "model": MODEL, "training": TRAINING, "run": RUN}
FLAGS = WHAT | MODEL | TRAINING | RUN | SETTINGS
COMMANDS = {}


def command(spec, *positional):
    """Enter the function cmd_NAME in COMMANDS, with `flags` {name: default}, those `needed`, and
    `positional` arguments. spec: names of flags, `name=default`, or `name!` if needed."""
    def enter(run):
        words = [word.rstrip("!").partition("=") for word in spec.split()]
        run.flags = {name: value_of(FLAGS[name][1], text, spec) if equals else FLAGS[name][0]
                     for name, equals, text in words}
        run.needed = [word[:-1] for word in spec.split() if word.endswith("!")]
        run.positional = positional
        COMMANDS[run.__name__[4:]] = run
        return run
    return enter


DATA = "data world streams taxonomy"
SHARED = "topk lam loss targets start"
CODE = "latents k norm dead-after aux-k aux-coef reinit-after"
KINDS = "activation revive sparsity error bias expansion bandwidth warmup"
STEPS = "preset epochs batch lr shuffle seed"
FOLDER = "device log-every save-every eval-rows overwrite resume"
ON_RUN = "data seed device out overwrite"


# ---- Runs: folders that a command owns while it writes ------------------------------------------
# Of torchrun's processes each trains on its share of every batch (`SPARC.across`) and does all
# else for itself; the first alone writes and speaks.

LAUNCHED = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, PROCESSES = int(LAUNCHED.get("RANK", 0)), int(LAUNCHED.get("WORLD_SIZE", 1))
FREE_ON_RESUME = {"out", "resume", "overwrite", "save_every", "device", "null"}


class Run:
    """A folder that one command writes to.

    flags    the settings: those typed or, on --resume, those that the run there was started with
    saved    its config.json where it goes on, else None
    files    its manifest, in config.json too: names of what it wrote, or is about to write

    What the manifest does not list is never replaced or removed, no link is followed, and no second
    process gets in: the lock ends with the process, whatever ends that."""

    held = {}                                                # lock files of this process, by path

    def __init__(self, flags, folder=None):
        """`folder`: instead of --out. Changes nothing there yet."""
        self.folder, self.flags = folder or flags.out, flags
        self.saved, self.files, self.about = None, [], {}
        self.way = "--out" if "out" in flags else "--export"
        if RANK == 0:
            self._enter()
        if PROCESSES > 1:                                    # the others take what the first found
            found = [self.flags, self.saved]
            torch.distributed.broadcast_object_list(found)
            self.flags, self.saved = found[0].replaced({"device": flags.device}), found[1]

    def _enter(self):
        """Look at what is there: may this command write, does it go on?"""
        flags = self.flags
        refuse(os.path.lexists(self.folder) and not os.path.isdir(self.folder),
               f"{self.folder} is a file - name a folder with {self.way}")
        if not os.path.isdir(self.folder) or not set(os.listdir(self.folder)) - {".lock"}:
            return
        refuse(os.path.realpath(self.folder) in inputs_of(flags),
               f"{self.folder} is read by this command - name another {self.way}")
        self._lock()
        more = ", --resume" * ("resume" in flags)
        refuse(not flags.get("resume") and not flags.get("overwrite"),
               f"{self.folder} holds files already - use --overwrite{more} or another {self.way}")
        if os.path.lexists(self.join("config.json")):
            config = read_config(self.folder)
            self.files = config["files"]
            if flags.get("resume"):
                self._go_on(config)

    def join(self, name):
        return os.path.join(self.folder, name)

    def _go_on(self, config):
        """Take the settings that the run was started with; those typed now must be the same."""
        theirs, flags = config["flags"], self.flags
        refuse(theirs.get("command", flags.command) != flags.command, f"{self.folder} holds a run "
               f"of {theirs.get('command')} - resume it with that command")
        for name in sorted(flags.given - FREE_ON_RESUME):
            refuse(flags[name] not in (theirs.get(name), "auto"),
                   f"--{name.replace('_', '-')} {flags[name]} differs from the run in "
                   f"{self.folder} - resume without it, or train anew with --overwrite")
        typed = FREE_ON_RESUME & flags.given | {"out", "resume", "overwrite"}
        self.flags = flags.replaced({k: v for k, v in theirs.items() if k not in typed})
        self.saved = config
        for name in ("threads", "processes"):                # sums are taken in another order
            before, now = config["versions"].get(name), versions()[name]
            if before not in (None, now):
                say_once(f"note: the run had {before} {name}, now {now}: last digits may differ")

    def _lock(self):
        """Keep other processes out until `release`; makes the folder if there is none."""
        path = self.join(".lock")
        if path in self.held:
            return
        try:
            os.makedirs(self.folder, exist_ok=True)
            lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"process {lock.read(20).strip()} is writing to {self.folder} - wait "
                             f"for it, or name another {self.way}")
        except OSError as e:
            raise InputError(f"cannot write to {self.folder} ({e.strerror}) - name another "
                             f"{self.way}")
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        self.held[path] = lock

    @classmethod
    def release(cls):
        """Give up the locks of this process: at the end of every command."""
        while cls.held:
            path, lock = cls.held.popitem()
            with contextlib.suppress(OSError):               # somebody removed the folder
                os.unlink(path)
            lock.close()

    def begin(self, **about):
        """Make the folder; unless the run goes on, remove what its manifest lists, and what a
        killed one left of it half written; write config.json: the flags and what `about` tells."""
        refuse(self.saved and self.saved.get("data_hash") != about.get("data_hash"),
               f"the data (or the run it joins) is not what the run in {self.folder} was trained "
               "on - restore it")
        if RANK:
            return self
        self._lock()
        if not self.saved:
            inputs = inputs_of(self.flags)
            for name in self.files:
                self._check(name)
                refuse(os.path.realpath(self.join(name)) in inputs,
                       f"{self.join(name)} is read by this command - name another {self.way}")
            for path in map(self.join, self.files):
                for left in [path, *glob.glob(glob.escape(path) + ".*.tmp")]:
                    if os.path.isfile(left) and not os.path.islink(left):
                        os.remove(left)
            self.files = []
        self.about = {"command": self.flags.command, "flags": self.flags, **about,
                      "versions": versions()}
        self.path("config.json")
        return self

    def _check(self, name):
        """Raise InputError unless a name stays in the folder, and no link leads out of it."""
        refuse(not plain(name), f"{name!r} cannot be the name of a file - rename it")
        straight = os.path.join(os.path.realpath(self.folder), name)
        refuse(os.path.realpath(self.join(name)) != straight,
               f"{self.join(name)} is a link - move it away, or name another {self.way}")

    def path(self, name):
        """The path of an output, which may lie in a folder of the run's: see `paths`."""
        return self.paths([name])[0]

    def paths(self, names):
        """The paths of outputs, in the manifest before they are written. Raises InputError where
        a file is that is not ours to replace."""
        for name in () if RANK else names:
            self._check(name)
            refuse(os.path.lexists(self.join(name)) and name not in self.files,
                   f"{self.join(name)} was not written by this run - move it away")
            os.makedirs(os.path.dirname(self.join(name)), exist_ok=True)
        listed = [*dict.fromkeys([*self.files, *names])]
        if not RANK and (listed != self.files or "config.json" in names):
            self.files = listed
            judge.write_json(self.join("config.json"), {**self.about, "files": self.files})
        return [self.join(name) for name in names]

    def write(self, files):
        """Write outputs {name: content}, each as the ending of its name says."""
        how = {"npz": judge.write_npz, "npy": lambda path, a: judge.write_npy(path, [a], len(a)),
               "json": judge.write_json, "pt": judge.write_torch,
               "png": judge.save_picture, "safetensors": judge.write_safetensors}
        for path, content in zip(self.paths(list(files)), files.values()):
            how[path.rpartition(".")[2]](path, content)
        return self

    def tell(self, page, metrics=None, quiet=False):
        """Write report.html and metrics.json, and say where they are."""
        if RANK == 0:
            page.write(self.path, metrics)
        if not quiet:
            say(f"wrote {self.join('report.html')}")

    def part(self, name, flags):
        """A run within this one. It goes on only if it was started with these very flags: another
        run, overwritten since, may have left a folder of that name."""
        self._check(name)
        folder, resume = self.join(name), False
        if self.saved and os.path.exists(os.path.join(folder, "config.json")):
            theirs = {k.replace("-", "_"): default for k, (default, *_) in FLAGS.items()}
            theirs |= read_config(folder)["flags"]
            resume = all(theirs.get(k) == v for k, v in flags.items() if k not in FREE_ON_RESUME)
        return Run(flags.replaced({"overwrite": True, "resume": resume}), folder)


def plain(name):
    """Whether a relative path with / stays where it is: no .., no empty or hidden part."""
    return all(part and part[0] != "." and "\\" not in part and "\0" not in part
               for part in name.split("/"))


def inputs_of(flags):
    """The real paths of what exists of all that the flags name to be read."""
    named = [piece for k in ("run", *FLAGS) if k == "run" or FLAGS[k][1] == "path"    # name=A:FILE
             for piece in {flags.get(k), *re.split("[,=:]", flags.get(k) or "")}]
    return {os.path.realpath(p) for p in named if p and os.path.exists(p)}


def out_file(flags, flag="out"):
    """The path in flags[flag], once it is clear that a file may be written there: no file of the
    user's without --overwrite, no link, and never what this very command reads."""
    path = flags[flag]
    refuse(not os.path.isdir(os.path.dirname(path) or "."),
           f"--{flag} {path}: no such folder - make it first")
    if not os.path.lexists(path):
        return path
    for given in inputs_of(flags):
        name = os.path.relpath(os.path.realpath(path), given)                # "." is `given` itself
        # beside a run's own files others may lie, such as the codes that an earlier call wrote
        beside = os.path.exists(os.path.join(given, "config.json")) \
            and name not in read_config(given)["files"]
        refuse(name == "." or not name.startswith("..") and not beside,
               f"{path} is read by this command - name another --{flag}")
    refuse(os.path.islink(path) or not os.path.isfile(path),
           f"{path} is no plain file - name another --{flag}")
    refuse(not flags.overwrite, f"{path} exists - use --overwrite, or another --{flag}")
    return path


def read_config(folder):
    """config.json of a run: a dict of dicts "flags", of their kinds, and "versions", and the list
    "files", its manifest."""
    path = os.path.join(folder, "config.json")
    match config := data.read_json(path):
        case {"flags": dict(flags), "versions": dict(), "files": list(files)} if all(
                isinstance(name, str) and plain(name) for name in files):
            check_kinds(flags, path)
            if "loss" in flags:                              # older runs do not say it
                flags.setdefault("start", 1.)
            return config
    raise InputError(f"{path} is no config of a run - restore it, or train anew elsewhere")


def check_kinds(values, path):
    """Raise InputError unless the values of flags in the file `path` could be typed for them."""
    for name, (default, kind, _) in FLAGS.items():
        value = values.get(name.replace("-", "_"), default)
        said = f"{path} has {value!r} as {name}"
        fits = value is default or value == value_of(kind, str(value), said, default)
        refuse(not fits, f"{said} - restore it, or train anew")


@contextlib.contextmanager
def unpacked(path, wrong, advice, device="cpu"):
    """What a .pt file holds, for lines that take it apart: what fails there is one line."""
    with sae.reading(path, wrong, advice), warnings.catch_warnings(action="ignore"):   # torch's
        yield torch.load(data.plain_file(path), weights_only=True, map_location=device)


def versions():
    """What a run depends on besides its flags: a dict for config.json."""
    return {"python": sys.version.split()[0], "torch": str(torch.__version__),
            "numpy": np.__version__, "scipy": scipy.__version__,
            "threads": torch.get_num_threads(), "processes": PROCESSES}


# ---- Training -----------------------------------------------------------------------------------

class Progress:
    """A line on stderr that rewrites itself on a terminal; elsewhere one every tenth of the way."""

    def __init__(self, total, start=0):
        self.total, self.first, self.began = total, start, time.time()
        self.live = sys.stderr.isatty()
        self.every = max(1, total // (1000 if self.live else 10))

    def __call__(self, step, text):
        if step % self.every and step < self.total:
            return
        left = (time.time() - self.began) / max(step - self.first, 1) * (self.total - step)
        line = f"step {step}/{self.total}  {text()}  {left:.0f} s left"
        end = "" if self.live and step < self.total else "\n"
        print(f"\r{line:<100}" if self.live else line, end=end, file=sys.stderr, flush=True)


class Log:
    """The rows of log.csv, as text, so that a resumed run keeps them to the byte.

    Those up to step `upto` are read; they need the `columns` that are drawn, and may be empty in
    `gaps` alone."""

    def __init__(self, path, upto=0, columns=(), gaps=()):
        self.path, self.rows = path, []
        if upto and os.path.exists(path):
            with (sae.reading(path, "is damaged", "restore it, or remove it and lose the curves"),
                  open(data.plain_file(path), newline="") as f):
                self.rows = [row for row in csv.DictReader(f) if int(row["step"]) <= upto]
                for row in self.rows:
                    numbers = [float(v) for k, v in row.items() if v or k not in gaps]
                    if not all(map(math.isfinite, numbers)) or not row.keys() >= {*columns}:
                        raise ValueError

    def add(self, row):
        refuse(self.rows and self.rows[0].keys() != row.keys(),
               f"{self.path} has other columns than this run - restore or remove it")
        self.rows.append({k: str(v) for k, v in row.items()})

    def write(self):
        text = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        judge.write_text(self.path, text.getvalue())


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and has saved."""


class Keeper:
    """Logs, shows progress, saves by save(step); obeys signals between two steps, never inside."""

    def __init__(self, flags, n_steps, start, log, save):
        self.flags, self.n_steps, self.log, self.save = flags, n_steps, log, save
        self.progress, self.last_save, self.stop = Progress(n_steps, start), time.time(), False

    def __enter__(self):
        self.before = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for n, handler in self.before.items():
            signal.signal(n, handler)

    def on_signal(self, number, frame):
        if RANK == 0:                                        # the others end when it has saved
            self.stop = True
            for n in self.before:                            # the second time at once, unsaved
                signal.signal(n, signal.default_int_handler)

    def __call__(self, step, row, text, log=False):
        """After each step. row() gives the row of log.csv, text() the words of progress."""
        last = step == self.n_steps
        if log or step % self.flags.log_every == 0 or last:
            self.log.add({"step": step, **row()})
        self.progress(step, text)
        due = self.stop or last or time.time() - self.last_save >= self.flags.save_every
        if due and RANK == 0:
            self.log.write()                                 # first: resuming cuts a longer log
            self.save(step)
            self.last_save = time.time()
        if self.stop:
            raise Interrupted(f"stopped at step {step} of {self.n_steps}")


def train(run, features):
    """Train, or go on training, the model of run.flags on `features`. Returns (model, Log). Where
    the flags name a run, or codes, --stream learns to join these, which stay as they are."""
    flags, rows, old, known = run.flags, features.rows("train"), None, features.hash
    if "run" in flags and not features.codes:
        old, _, _ = sae.load(os.path.join(flags.run, "checkpoint.pt"), flags.device)
        known += f" {sum(W.detach().sum().item() for W in old.W_enc.values())}"
    refuse(flags.batch < PROCESSES, f"--batch {flags.batch} for {PROCESSES} processes - give each "
           "a sample")
    model = make_model(features, flags, rows).to(flags.device)
    optimiser = sae.make_optimiser(model, flags.lr)
    batches = data.Batches(rows, flags.batch, flags.seed, flags.shuffle)
    n_steps = flags.epochs * batches.epoch
    run.begin(dims=features.dims, data_hash=known, train_rows=len(rows))
    checkpoint = run.path("checkpoint.pt")
    if run.saved and os.path.exists(checkpoint):
        model, optimiser, _ = sae.load(checkpoint, flags.device)
    log = Log(run.path("log.csv"), int(model.step), ("self", "cross"))

    def on_step(step, result):
        loss = float(result["loss"]) if step % flags.log_every == 0 else 0.
        if not math.isfinite(loss):                          # reading it waits for a GPU
            raise InputError(f"the loss is {loss} at step {step} - lower --lr, or try a --norm")
        keep(step, lambda: {"epoch": round(step / batches.epoch, 3), **sae.told(model, result)},
             lambda: f"loss {float(result['loss']):.4f}  dead "
             + "/".join(str(int(model.dead(s).sum())) for s in model.streams))

    @torch.no_grad()
    def seen(some):
        x = {s: v.to(flags.device) for s, v in features.batch(some).items()}
        if old:
            x = {flags.stream: x.pop(flags.stream), **old.encode(x, "alone")}
        return {**x, **given_codes(features, some, flags.device)}
    old = old if len(model.streams) == 1 else None           # it has joined already
    parts = {"encoder": [model.W_enc, model.b_lat], "dictionary": [model.W_dec]}
    for weights in parts.get(flags.get("control"), ()):
        weights.requires_grad_(False)
    joins = old or features.codes
    if joins and not model.step:
        some = rows[features.has(flags.stream, rows)]
        sae.join_start(model, seen(some[::1 + len(some) // 4096]))
    with Keeper(flags, n_steps, int(model.step), log,
                lambda step: sae.save(checkpoint, model, optimiser)) as keep:
        sae.fit(model, lambda step: seen(np.array_split(batches.rows(step), PROCESSES)[RANK]),
                n_steps, flags.lr, optimiser, on_step, flags.get("warmup", 0),
                sae.join_loss if joins else None)
    if old:
        model = sae.merged(old, model)
        sae.save(checkpoint, model)
    return model, log


def given_codes(features, rows, device):
    """The codes of `rows` that a file gave, of streams whose features are elsewhere."""
    return {s: sae.Codes(*(torch.from_numpy(v[rows]).to(device) for v in pair))
            for s, pair in features.codes.items()}


def resolved(flags, features):
    """The flags with all that was left open, None or "auto", filled in: by `known_settings`, else
    by the number of training rows; says what those chose."""
    n, known = len(features.rows("train")), known_settings(flags, features)
    auto = settings_for(n, len(features.streams),
                        *map(known.get, ("latents", "k", "batch", "epochs")))
    mapped = any(isinstance(x, np.memmap) for x in features.streams.values())
    auto["shuffle"] = "blocks" if mapped else "samples"      # on disk neighbouring rows are cheap
    chosen = {k: auto[k] for k in flags if k in auto and k not in known}
    flags = flags.replaced({k: v for k, v in (known | chosen).items() if k in flags})
    refuse(flags.get("sparsity") and not sae.ACTIVATIONS[flags.activation].sparsity,
           f"--sparsity has no effect on {flags.get('activation')} - leave it out, or set --k")
    if flags.get("null") == "auto":
        seconds = planned_seconds(features.dims, topk=flags.get("topk"),
                                  **flags.pick("latents k batch targets"))
        flags["null"] = auto["steps"] * seconds < 60
    if chosen:
        shown = ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}"
                          for k, v in chosen.items()).replace("_", "-")
        say_once(f"chosen by the number of training rows, {n}: {shown}; {auto['steps']} steps")
    if flags.shuffle == "blocks" and features.sorted_rows():
        say_once("note: the rows are sorted by label, so that blocks of them hold one kind each - "
                 "shuffle the file, or use --shuffle samples")
    return flags


def settings_for(n, streams=1, latents=None, k=None, batch=None, epochs=None):
    """Settings, {name: value}, that fit n training samples; what is given stays. A third as many
    latents as samples and an eighth of them kept (but 40: with fewer even small files are rebuilt
    badly), 50 passes in steps of a tenth of the samples, every dimension standardised; from 25,000
    samples on the thesis's L, k, batch and epochs (5.3.2). The learning rate falls with the root of
    L (Gao et al. 2024). Of more than 4 streams a code rebuilds 2 others: Eq. 14 costs M^2."""
    def power_of_two(most, least, limit):
        return min(max(2 ** (int(most).bit_length() - 1), least), limit)
    L = latents or power_of_two(n / 3, 128, 8192)
    batch, epochs = batch or power_of_two(n / 10, 1, 256), epochs or 50
    steps = epochs * -(-n // batch)
    return {"latents": L, "k": k or min(max(L // 8, 40), 64, L), "batch": batch,
            "lr": 2e-4 * (2 ** 14 / L) ** 0.5, "epochs": epochs, "steps": steps,
            "norm": "standard,l2", "dead_after": max(1, min(1000, steps // 4)),
            "targets": max(1, streams - 1) if streams <= 4 else 2}


# What settings are, whatever the number of samples: of several streams (thesis 5.3.2, A.1.2), ...
SHARED_PRESETS = {"thesis": {"latents": 8192, "k": 64, "batch": 256, "lr": 1e-4, "epochs": 50,
                             "norm": "l2", "shuffle": "blocks", "dead_after": 1000, "start": 1.}}
# ... and of one: thesis 4.1, Mammo-SAE 3, CytoSAE 2; what these leave open is as in their code.
SINGLE_PRESETS = {
    "thesis": {"activation": "relu", "error": "sum", "norm": "none", "revive": "none"},
    "mammo": {"activation": "relu", "error": "mean", "sparsity": 3e-5, "norm": "none",
              "revive": "resample", "expansion": 8, "lr": 3e-4, "batch": 4096, "epochs": 200},
    # 64 images of 257 tokens a step; 10^6 of 41,906 images seen
    "cyto": {"activation": "relu", "error": "mean", "sparsity": 8e-5, "norm": "none",
             "revive": "ghost", "bias": "median", "expansion": 64, "lr": 4e-4, "warmup": 500,
             "batch": 16448, "epochs": 24, "dead_after": 64},
}
# What finds the 48 planted concepts, three or four in a sample; some activations need their own.
PLANTED = {"latents": 128, "k": 6, "norm": "l2"}
PLANTED_ONE = {"batchtopk": {"k": 3}, "matryoshka": {"k": 3},
               "jumprelu": {"sparsity": 0.1, "bandwidth": 0.3}}


def known_settings(flags, features):
    """Settings, {name: value}, that no number of samples chooses: what was typed, before the
    preset, before what made-up data want, before the activation's own."""
    single, known = "activation" in flags, {"start": 1 / 3}
    preset = (SINGLE_PRESETS if single else SHARED_PRESETS).get(flags.preset, {})
    refuse(flags.preset and not preset, f"preset {flags.preset} is of one stream - use it with sae")
    if single:
        kind = flags.activation or preset.get("activation", "topk")
        sae.one_of("activation", kind, sae.ACTIVATIONS)
        known = {"activation": kind, "bias": "zeros", "warmup": 0, "bandwidth": 0.1,
                 **sae.ACTIVATIONS[kind]._asdict()}
    if flags.data is None and flags.world == "planted":
        known |= PLANTED | PLANTED_ONE.get(known.get("activation"), {})
    known |= preset
    refuse({"expansion", "latents"} <= flags.given,
           f"--set expansion and --latents {flags.latents} - give one of the two")
    if flags.preset:                                         # Eq. 14 has all pairs
        known["targets"] = max(1, len(features.streams) - 1)
    if expansion := flags.get("expansion") or known.get("expansion"):
        known["latents"] = expansion * max(features.dims.values())
    return known | {k: v for k, v in flags.items() if v not in (None, "auto")}


def planned_seconds(dims, latents, k, batch, topk="local", targets=1):
    """About how long a step takes on two cores: all logits of a batch, products by sources."""
    logits, products = batch * latents, min(len(dims), targets + 1) * batch * k
    seconds = 2e-3 + sum(dims.values()) * (3e-11 * logits + 1e-9 * products)
    return 2 * seconds if topk == "both" else seconds


def make_model(features, flags, rows):
    """The untrained SAE or SPARC of `flags`; its statistics and bias are of the training rows."""
    needs = 32 * flags.latents * sum(features.dims.values())  # weights, gradients, Adam's moments
    refuse(needs > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
           f"--latents {flags.latents} needs {needs / 2 ** 30:.0f} GiB of memory - lower it")
    shared = flags.pick("k norm aux_k aux_coef dead_after reinit_after seed")
    if "standard" in flags.norm:
        shared["stats"] = features.statistics(rows)
    if "run" in flags:
        return sae.SPARC({flags.stream: features.dims[flags.stream]}, flags.latents, topk="local",
                         start=1., **shared)
    if "activation" not in flags:
        return sae.SPARC(features.dims, flags.latents, reduction=flags.loss, **shared,
                         **flags.pick("topk lam targets start"))
    model = sae.SAE(features.dims, flags.latents, threshold=0.1, **shared,
                    **flags.pick("activation sparsity error revive bandwidth"))
    if flags.bias != "zeros":
        drawn = np.sort(np.random.default_rng([flags.seed, 5]).permutation(rows)[:32768])
        model.start_bias(features.batch(drawn)[model.streams[0]], flags.bias)
    return model


# ---- Measuring ----------------------------------------------------------------------------------

def evaluation_rows(features, flags, *splits):
    """Rows of the first split that has any, at most --eval-rows of them, drawn with the seed."""
    rows = features.rows(*splits)
    if 0 < flags.eval_rows < len(rows):
        rng = np.random.default_rng([flags.seed, 4])
        rows = np.sort(rng.choice(rows, flags.eval_rows, replace=False))
    return rows


def codes_and_fit(model, features, rows, mode, times=None):
    """In one pass the codes of `rows`, {stream: CSR (n, L)}, and how they rebuild each stream: a
    dict of r2, nmse (see `judge.reconstruction`) and the share of (sample, stream) with its first
    stream's latents."""
    pieces = []

    def reconstructions():
        for some in np.split(rows, range(1024, len(rows), 1024)):
            (x, codes), = sae.encoded(model, features.batch, some, mode)
            given = given_codes(features, some, model.step.device)
            pieces.append(codes | given)
            x_hat = {(t, s): model.decode(z, t).detach() for t in x for s, z in pieces[-1].items()}
            x = {t: model.normalise(v, t) for t, v in x.items()}
            for s, z in given.items():                       # NaN: the sample lacks it
                x[s] = torch.where(z.indices[:, :1] < 0, torch.nan, 0.)
            yield x, x_hat
    fit = judge.reconstruction(reconstructions(), times)
    codes = sae.joined(pieces)
    first = np.full((1, 1), -1)                              # of the first stream that is there
    for indices, _ in codes.values():
        first = np.where(first[:, :1] < 0, indices, first)
    fit["same_choice"] = float(np.mean(np.concatenate(
        [(first == c.indices).all(1)[c.indices[:, 0] >= 0] for c in codes.values()])))
    return {s: judge.sparse_code(*code, model.n_latents) for s, code in codes.items()}, fit


def measure(model, features, flags):
    """All numbers of thesis 5.4.1-5.4.5 and sparc.txt 4.3, joint and alone: (metrics, the codes
    that were judged, {mode: {stream: CSR}})."""
    features, several = features.per_token(), len(model.streams) > 1
    rows = evaluation_rows(features, flags, "test", "val")
    whole, draws = features.whole or features, flags.get("bootstrap", 0)
    groups = whole.about.get("groups", np.arange(len(whole)))
    groups = np.repeat(groups, len(features) // len(whole))[rows]
    times = judge.drawn_again(groups, draws, flags.seed)
    freedom = (len(np.unique(groups)) if draws else len(times) - 1) - 1
    codes, out = {}, {"split": str(features.split[rows[0]]), "rows": len(rows),
                      "of": len(features.rows("test", "val")), "steps": int(model.step),
                      "latents": model.n_latents, "topk": model.topk}
    for mode in ("joint", "alone") if several else ("alone",):
        found, fit = codes_and_fit(model, features, rows, mode, times)
        codes[mode] = {s: found[s] for s in model.streams}
        block = {**judge.code_metrics(found, features, rows, times), **fit}
        out[mode] = judge.taken(block, 0)
        out[mode]["headline"] = judge.headline(out[mode])
        anew = functools.partial(judge.latent_metrics, found, features, rows) if draws else None
        out[mode]["within"] = judge.within(block, times, freedom, anew)
    if draws:
        out["bootstrap"] = draws
    if features.labels is not None:
        out["positives"] = int(features.label_matrix(rows).sum(0).max(initial=0))
    out["l0"] = float(np.mean([code.nnz / max(features.has(s, rows).sum(), 1)
                               for s, code in codes["alone"].items()]))
    wanted = several or features.codes and model.n_latents <= 2048     # else it would take long
    if wanted and not features.order:                        # of a null nobody asks for it
        parts = evaluation_rows(features, flags, "train"), rows
        seen = [normalised(model, features, part, flags.device) for part in parts]
        for x, part in zip(seen, parts):
            for s, z in given_codes(features, part, "cpu").items():
                x[s] = z.dense(model.n_latents).numpy()
                x[s][z.indices[:, 0] < 0] = np.nan           # it is missing
        out["linear_baseline"] = judge.linear_baseline(*seen, model.streams)
    if several and features.lacks:
        here = {s: features.has(s, rows) for s in model.streams}
        out["samples"] = {" / ".join(names): int(np.all([here[s] for s in names], 0).sum())
                          for n in (1, 2) for names in itertools.combinations(here, n)}
    if features.truth:
        found = {s: model.dictionary(s).cpu().numpy() for s in model.streams}
        out["recovery"] = judge.recovery(found, features.truth)
    return out, codes


def normalised(model, features, rows, device):
    """Features of rows as the model sees them, the mean over tokens: {stream: (len(rows), d)}."""
    found = {s: model.normalise(x.to(device), s).cpu().numpy()
             for s, x in features.batch(rows).items()}
    return {s: x.mean(1) if x.ndim == 3 else x for s, x in found.items()}


def token_codes(model, features, rows, mode):
    """Codes of samples (n,), token by token: {stream: CSR (n * T, L)}."""
    T = features.tokens or 1
    tokens = (np.asarray(rows)[:, None] * T + np.arange(T)).ravel()
    blocks = sae.encoded(model, features.per_token().batch, tokens, mode)
    found = sae.joined([codes for _, codes in blocks])
    return {s: judge.sparse_code(*v, model.n_latents) for s, v in found.items()}


def explored(model, features, flags, names=None):
    """What `judge.explorer` shows of a model: (features, rows of samples, dict). Of tokens the mean
    over a sample's, and where a latent is strongest."""
    features = features.whole or features
    T, modes = features.tokens or 1, ("joint", "alone")[len(features.streams) == 1:]
    rows = evaluation_rows(features, flags, "test", "val")
    rows = rows if T == 1 else rows[:2000]                   # as many as a page shows
    codes, places = {}, {}
    for mode in modes:
        found = token_codes(model, features, rows, mode)
        codes[mode] = {s: judge.pool_tokens(code, T)[0] for s, code in found.items()}
        if T > 1:
            places[mode] = {s: judge.strongest_tokens(code, T) for s, code in found.items()}

    def seen(some):
        found = normalised(model, features, some, flags.device)
        return {s: np.nan_to_num(x) for s, x in found.items()}
    learn, probe = features.rows("train"), None
    learn = learn[features.labelled[learn]][:2000]
    y = learn if features.labels is None else features.labels[learn]
    there = {s: features.has(s, learn) for s in features.streams}
    if 1 < len(np.unique(y, axis=0)) and len(features.label_names) in range(2, 200) \
            and all(some.any() for some in there.values()):
        probe = {s: judge.logistic_fit(x[there[s]], y[there[s]], len(features.label_names))
                 for s, x in seen(learn).items()}
    weights = {name: {s: of[s].detach().cpu().numpy() for s in features.streams}
               for name, of in (("dictionary", model.W_dec), ("bias", model.b_pre))}
    return features, rows, {"codes": codes, "places": places, "seen": seen, "probe": probe,
                            "names": names, **weights}


def judged(run, features=None, quiet=False):
    """Train on the features, else on those that the flags name, with --null once more on shuffled
    streams, and measure; write metrics.json and report.html. Returns metrics, and `explored`.
    Several --seeds are `compared`."""
    if run.flags.get("seeds", 1) > 1:
        return compared(run, {"": {}}, judge.tell_seeds)
    features = features or read_to_train(run.flags)
    run.flags = flags = resolved(run.flags, features)
    model, log = train(run, features)
    metrics, twin = measure(model, features, flags)[0], None
    if flags.get("null"):
        say("the null: the same again with every stream but the first shuffled")
        shuffled, part = features.shuffled(flags.seed), flags.replaced({"null": False})
        null, twin = measure(train(run.part("null", part), shuffled)[0], shuffled, flags)
        metrics["null"] = {mode: null[mode] for mode in ("joint", "alone") if mode in null}
    again = f"add it with {resuming(flags, ' --null')}" if "null" in flags else None
    metrics["verdict"] = judge.verdict(metrics, again)
    name, shown = os.path.basename(os.path.abspath(run.folder)), explored(model, features, flags)
    shown[2].update(null=twin, curves=judge.training_curves(log.rows))
    page = judge.Page(f"repsae {flags.command}: {name}")
    judge.tell_summary(page, metrics, quiet, judge.explorer(*shown[:2], {name: shown[2]}))
    judge.tell_run(page, metrics, flags)
    run.tell(page, metrics, quiet)
    return metrics, shown


def compared(run, changes, tell):
    """Train and judge a run, or --seeds of them, for each of `changes`, {name: {flag: value}}, in a
    folder of `run`, and put them beside each other: tell(page, {name: metrics})."""
    flags, features = run.flags, read_to_train(run.flags)
    if "activation" not in flags:                            # kinds of SAE have their own settings
        flags = resolved(flags, features)
    seeds, trials, groups, results, shown = flags.get("seeds", 1), {}, {}, {}, {}
    refuse(flags.seed + seeds > 2 ** 32, f"--seed {flags.seed} --seeds {seeds} - lower one of them")
    for name, change in changes.items():
        trial, mine = flags.replaced(change), features
        if {"streams", "seed"} & change.keys():              # the seed draws the split too
            mine = read_to_train(trial)
        trial = resolved(trial, mine)
        # sizes that do not fit fail before anything is written; torch loads its first optimiser
        sae.make_optimiser(sae.SPARC(mine.dims, trial.latents, trial.k))
        for n in range(trial.seed, trial.seed + seeds):
            how = trial.replaced({"seed": n, "seeds": 1}) if seeds > 1 else trial
            one = f"{name}_seed{n}".lstrip("_") if seeds > 1 else name
            trials[one] = how, mine if n == trial.seed else read_to_train(how)
            groups.setdefault(name, []).append(one)
    run.flags = flags
    run.begin(data_hash=features.hash)
    page = judge.Page(f"repsae {flags.command}: {os.path.basename(run.folder)}")
    for name, (trial, mine) in trials.items():
        say(f"-- {name}")
        began = time.time()
        results[name], shown[name] = judged(run.part(name, trial), mine, quiet=True)
        results[name]["seconds"] = round(time.time() - began, 2)
    whole = results if seeds == 1 else {
        name: judge.over_seeds([results[one] for one in group]) for name, group in groups.items()}
    tell(page, whole)
    same, rows, _ = next(iter(shown.values()))
    if seeds > 1 and flags.data:                             # made-up data each seed draws anew
        judge.tell_stability(page, {name: [shown[one][2] for one in group]
                                    for name, group in groups.items()})
    parts = {name: part for name, (one, _, part) in shown.items() if one is same}
    if len(parts) <= 8:
        page.explore(judge.explorer(same, rows, parts))
    run.tell(page, results)


def read(flags):
    """The features that the flags name, or the made-up ones; says what is to be known of them."""
    names = flags.streams.split(",") if flags.streams else None
    if flags.data is not None:
        features = data.read_features(flags.data, names, flags.taxonomy, flags.seed)
    else:
        make = data.planted_streams if flags.world == "planted" else drawn_tissue
        features = make(seed=flags.seed)
        names = names or [*features.streams]
        refuse(not {*names} <= {*features.streams}, "the made-up data has no stream "
               f"{flags.streams} - it has {', '.join(features.streams)}")
        features.streams = {s: features.streams[s] for s in names}
    return noted(features)


def noted(found):
    """What was read, once its notes are said."""
    for note in found.notes:
        say_once("note: " + note)
    return found


def drawn_tissue(seed, n=1200):
    """Pictures of drawn tissue as three models see them that learn nothing: a ViT of random
    weights, a histogram of colours, latent semantic analysis of the captions."""
    say_once(f"drawing {n} pictures of tissue; --data takes features of your own")
    made = data.tissue(n, seed=seed)
    pixels, captions = made["pixels"], list(made["captions"])
    torch.manual_seed(seed)
    vit = ssm.make_backbone("vit_micro", size=64).eval()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    with torch.no_grad():
        seen = torch.cat([vit.features(part) for part in x.split(256)]).numpy()
    words = data.latent_semantics(captions, np.flatnonzero(made["split"] == "train"))
    return data.Features({"vit": seen, "colour": data.colours(pixels), "words": words},
                         labels=made["labels"], label_names=made["label_names"].tolist(),
                         parents=made["parents"], split=made["split"], hash=f"tissue {n} {seed}",
                         about={"images": pixels, "captions": made["captions"],
                                "groups": made["groups"]})


def read_to_train(flags):
    """`read`, once there is something to train on, something to judge by, and as many streams as
    the command needs: two to share a code, else that of --stream; every token is a sample."""
    single = "activation" in flags
    if single and (flags.stream or flags.data is None):
        first = {"planted": "vision", "tissue": "vit"}[flags.world]
        flags = flags.replaced({"streams": flags.stream or first})
    features = read(flags)
    features.rows("test", "val")
    refuse("targets" in flags and "stream" not in flags and len(features.streams) < 2,
           f"{flags.command} shares a code among streams and needs two streams, not "
           f"{list(features.streams)[0]} alone - give more, or use sae for one")
    refuse(single and len(features.streams) > 1,
           f"{flags.data} has the streams {', '.join(features.streams)} - pick one with --stream")
    flat = features.per_token()
    refuse(len(flat.rows("train")) < 2, "the train split has 1 sample - give at least two")
    for s in flat.lacks:
        refuse(flat.has(s, flat.rows("train")).sum() < 2,
               f"stream '{s}' is missing in the train split - leave it out")
    if features.tokens:
        say_once(f"note: each of the {features.tokens} tokens of a sample counts as a sample")
    return flat


# ---- A run in use: its model, features and codes ------------------------------------------------

class Coded:
    """A run's model with features, its own or those of --data, and the codes of their streams; for
    a run also stands the folder of another library's SAE, see `sae.load_public`.

    flags   the command's, with the run's own data, seed and (if it takes one) taxonomy where none
            were typed
    T       tokens of a sample, 1 where it is one vector"""

    def __init__(self, run, flags, streams=None):
        self.run, flags = run, as_trained(run, flags)
        there = data.Source(flags.data).streams if flags.data else ()
        streams = streams or flags.get("stream") or flags.get("streams")
        if foreign(run):
            one = streams or ",".join(there)
            refuse("," in one, f"{run} is of one stream, {flags.data} has {one} - pick one with "
                   f"--stream{'' if 'stream' in flags else 's'}")
            self.model = sae.load_public(run, one, flags.device)
        else:
            self.model, _, _ = sae.load(os.path.join(run, "checkpoint.pt"), flags.device)
        known = [s for s in self.model.streams if s in there or not flags.data]
        streams = streams or ",".join(known)
        refuse(not known, f"{flags.data} has {', '.join(there) or 'no streams'}, the run knows "
               f"{', '.join(self.model.streams)} - check the keys")
        self.flags = flags.replaced({"streams": streams})
        self.features = read(self.flags)
        mine, theirs = self.features.dims, self.model.dims
        refuse(not mine.items() <= theirs.items(), f"the run was trained on {theirs}, the data has "
               f"{mine} - take streams that it knows")
        self.T = self.features.tokens or 1

    def codes(self, rows, mode="alone"):
        """Codes of samples (n,), token by token: {stream: CSR (n * T, L)}."""
        return token_codes(self.model, self.features, rows, mode)

    def pool(self, tau=0.):
        """Of the one stream, alone: `strength` and `count`, CSR (N, L), of `judge.pool_tokens`,
        `groups` (N,), and `W` (L, d) and `b` (d,), dictionary and bias."""
        refuse(len(self.features.streams) > 1, f"{self.run} has {', '.join(self.features.streams)}"
               f" - pick one with --stream{'' if 'stream' in self.flags else 's a,b'}")
        (self.stream,), N = self.features.streams, len(self.features)
        pooled = [judge.pool_tokens(self.codes(some)[self.stream], self.T, tau)
                  for some in self.blocks(np.arange(N))]
        self.strength, self.count = (scipy.sparse.vstack(part).tocsr() for part in zip(*pooled))
        refuse(not np.isfinite(self.strength.data).all(),
               f"the codes of {self.run} are not finite - train it with a lower --lr")
        refuse(not self.strength.nnz, f"no latent of {self.run} is active on any sample - train it "
               "longer, or with less sparsity")
        self.W, self.b = (v[self.stream].detach().cpu().double().numpy()
                          for v in (self.model.W_dec, self.model.b_pre))
        self.groups = self.features.about.get("groups", np.arange(N))
        self.train, self.test = self.features.rows("train"), self.features.rows("test", "val")
        return self

    def blocks(self, rows):
        """The rows in parts of some 4,096 tokens."""
        step = max(1, 4096 // self.T)
        return np.split(rows, range(step, len(rows), step))

    def dense(self, rows):
        """Normalised features of samples (n,) of the one stream, the mean over tokens: (n, d), 0
        where missing."""
        found = [normalised(self.model, self.features, some, self.flags.device)[self.stream]
                 for some in self.blocks(rows)]
        return np.nan_to_num(np.concatenate(found))

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


def foreign(run):
    """Whether `run` is a folder that another library wrote."""
    theirs = [name for name in sae.LIBRARIES if os.path.isfile(os.path.join(run, name))]
    return theirs != [] and not os.path.isfile(os.path.join(run, "checkpoint.pt"))


def as_trained(run, flags):
    """The flags, with what a run was trained on where it was not typed: data, seed, taxonomy."""
    refuse(foreign(run) and not flags.data, f"{run} has no data of its own - name some with --data")
    refuse(not foreign(run) and not os.path.exists(os.path.join(run, "config.json")),
           f"{run} is no run folder - name one that sparc or sae wrote")
    own = {} if foreign(run) else read_config(run)["flags"]
    own = {k: own[k] for k in ("data", "taxonomy", "seed", "world") if k in own
           and (k in flags or k in ("seed", "world")) and k not in flags.given}
    return flags.replaced({"taxonomy": None, "world": "planted", **flags, **own})


def label_number(features, label):
    """The number of a label given by name or number; raises InputError when there is none of it."""
    if label in features.label_names:
        return features.label_names.index(label)
    if label.isdecimal() and int(label) < len(features.label_names):
        return int(label)
    known = ", ".join(features.label_names[:20]) or "none: the file has no labels"
    raise InputError(f"no label '{label}' - take one of {known}")


def analysis_run(flags, name):
    """The Run that an analysis of a run writes: --out, or the folder `name` inside that run."""
    refuse(not flags.out and (not plain(name) or "/" in name),
           f"{name!r} cannot be the name of a folder - name one with --out")
    return Run(flags, flags.out or os.path.join(flags.run, name))


# ---- Sparse codes: training and using them (thesis 4.1, 5) --------------------------------------

@command(f"{DATA} {CODE} {SHARED} null seeds {STEPS} {FOLDER} out=runs/sparc")
def cmd_sparc(flags):
    """Train SPARC on two streams or more, and report every cross-stream number joint and alone."""
    judged(Run(flags))


@command(f"{DATA} stream {CODE} {KINDS} seeds {STEPS} {FOLDER} out=runs/sae")
def cmd_sae(flags):
    """Train a sparse autoencoder on one stream (thesis 4.1 and its relatives), or every kind."""
    run = Run(flags)
    if run.flags.activation == "all":
        kinds = [(name, own.revive) for name, own in sae.ACTIVATIONS.items()]
        kinds += [("relu", "none"), ("relu", "ghost")]
        changes = {f"{name}_{revive}": {"activation": name, "revive": revive}
                   for name, revive in sorted(kinds)}
        return compared(run, changes, judge.tell_activations)
    judged(run)


@command(f"data taxonomy stream! null preset epochs batch lr shuffle {FOLDER} out=runs/add", "run")
def cmd_add(flags):
    """A further stream learns the code of a run of sparc, whose streams stay as they are, from
    samples of both; the new run has them all. Seed and split are the run's.

    For RUN also stands a file of codes that encode wrote: whoever has neither its models nor its
    features joins it by the codes of samples that both have, and gets a run of the stream alone."""
    run = Run(flags)
    if os.path.isfile(run.flags.run):                        # of codes, whose split counts
        check_needed(run.flags, "data")
        usual = {name.replace("-", "_"): FLAGS[name][0] for name in f"{CODE} {SHARED} seed".split()}
        flags = Flags({**usual, "start": 1., "world": "planted",
                       "streams": run.flags.stream, **run.flags})
        features, latents, k = data.with_codes(read_to_train(flags), flags.run)
        run.flags = flags.replaced({"latents": latents, "k": k})
        return judged(run, features)
    if not run.saved:
        old, _, _ = sae.load(os.path.join(flags.run, "checkpoint.pt"))
        own, new = old.config, flags.stream
        refuse("activation" in own or new in own["dims"], f"{flags.run} is of sae, or has a stream "
               f"'{new}' already - name a run of sparc, and a new stream")
        run.flags = as_trained(flags.run, flags).replaced({
            **{k: own[k] for k in ("k", "norm", "topk", "aux_k", "aux_coef", "reinit_after")},
            "latents": own["n_latents"], "targets": len(own["dims"]), "dead_after": "auto",
            "streams": ",".join([*own["dims"], new])})
    features = read_to_train(run.flags)
    refuse(run.flags.stream not in features.dims, "--stream names one stream - add one by one")
    judged(run, features)


@command(f"{DATA} seed device eval-rows bootstrap json export overwrite", "run")
def cmd_eval(flags):
    """Measure a trained run again, on its own data or on other features of the same streams; other
    streams of the file tell whether samples of a latent are alike in their eyes too."""
    coded, files = Coded(flags.run, flags), {}
    for s in coded.model.streams:
        refuse(s not in coded.features.streams, f"the data lacks the run's stream '{s}' - eval "
               f"needs {', '.join(coded.model.streams)}")
    run = Run(flags, flags.export) if flags.export else None
    for s in coded.model.streams if run else ():
        told = judge.saelens(coded.model, s)
        refuse(not told, f"SAELens has no {coded.model.activation} with norm {coded.model.norm}: "
               "not all fold into weights - topk, relu and jumprelu do, by standard, l2 or none")
        files |= {f"{s}/sae_weights.safetensors": told[1], f"{s}/cfg.json": told[0]}
    (metrics, codes), page = measure(coded.model, coded.features, coded.flags), judge.Page("")
    judge.tell_summary(page, metrics)
    if others := outsiders(coded):
        judge.tell_monosemanticity(page, codes["alone"], others, coded.flags.seed)
    if run:
        run.begin().write(files)
    return {**metrics, **page.metrics}


def outsiders(coded):
    """{stream: (n, d)}, of the judged samples, of the data's streams that had no part in the code:
    not of the run, nor of the codes that it joined. What cannot be read does not judge."""
    path, known, found = coded.flags.data, {*coded.model.streams}, {}
    if not path or coded.T > 1:
        return found
    joined = {} if foreign(coded.run) else read_config(coded.run)["flags"]
    if os.path.isfile(joined.get("run") or ""):
        known |= {key.removesuffix("_indices") for key in data.Source(joined["run"]).keys}
    rows = evaluation_rows(coded.features, coded.flags, "test", "val")
    for s in [s for s in data.Source(path).streams if s not in known]:
        with contextlib.suppress(data.InputError):           # nor does a stream of tokens
            seen = data.read_features(path, [s], None, coded.flags.seed, most=2)
            found[s] = seen.batch(rows)[s].numpy()
    return found


@command(f"{DATA} seed device mode overwrite out=codes.npz", "run")
def cmd_encode(flags):
    """Write the sparse codes of features: <stream>_indices and _values, (N, k), or (N, T, k).

    Samples with fewer active latents may be filled up with index -1, value 0."""
    path, coded = out_file(flags), Coded(flags.run, flags)
    features, kept = coded.features, {"n_latents": coded.model.n_latents, "mode": flags.mode}
    shape, flat = [*next(iter(features.streams.values())).shape[:-1], -1], features.per_token()
    blocks = sae.encoded(coded.model, flat.batch, np.arange(len(flat)), flags.mode)
    for s, code in sae.joined([codes for _, codes in blocks]).items():
        kept |= {f"{s}_{name}": v.reshape(shape) for name, v in code._asdict().items()}
    if not features.tokens:                                  # for who adds a stream to them
        kept["split"] = features.split
    if "ids" in features.about:
        kept["ids"] = features.about["ids"]
    judge.write_npz(path, kept)
    say(f"wrote {path}: {len(features)} samples, {', '.join(features.streams)}, {flags.mode}")


@command(f"{DATA} over! {CODE} {SHARED} {STEPS} {FOLDER} out=runs/sweep")
def cmd_sweep(flags):
    """A run for every combination of settings, or of sets of streams, beside each other (thesis
    5.4.8, sparc.txt 5, B and C)."""
    run, axes, changes = Run(flags), {}, {}                  # axes: {setting: its values}
    known = {*GROUPS["model"], *GROUPS["training"], *SETTINGS} & {*cmd_sweep.flags}
    for word in (run.flags.over or "").split() or [""]:
        name, _, values = word.partition("=")
        key, values = name.replace("-", "_"), values.split(",")
        kind = FLAGS[name][1] if name in known else "text"
        sets = name == "streams" and all(s for v in values for s in v.split("+"))
        refuse(key in axes or kind in ("text", "switch") and not sets, f"--over {word} - write for "
               'example "topk=global,local lam=0,1" or "streams=a+b,a+b+c"')
        axes[key] = [*dict.fromkeys(value_of(kind, v, f"--over {word}: {v}") for v in values)]
    for values in itertools.product(*axes.values()):
        change = dict(zip(axes, values))
        name = "_".join(v if isinstance(v, str) else f"{key}{v:.9g}" for key, v in change.items())
        if "streams" in change:
            change["streams"] = change["streams"].replace("+", ",")
        changes[name] = change                               # "global_lam1"
    compared(run, changes, functools.partial(judge.tell_sweep, axes=axes))


ABLATION = {f"{topk}_lam{lam:g}": {"topk": topk, "lam": lam} for topk, lam in (
    ("global", 1.), ("global", 0.), ("local", 1.), ("local", 0.), ("both", 1.), ("random", 1.))}


@command(f"{DATA} {CODE} loss targets start null controls seeds {STEPS} {FOLDER} out=runs/ablate")
def cmd_ablate(flags):
    """The 2x2 of thesis 5.3.4 plus `both` and `random`, joint and alone, each with its null."""
    run = Run(flags)
    parts = {"encoder": 1., "dictionary": run.flags.start}   # short frozen rows could not grow
    controls = {f"frozen_{part}": {"topk": "global", "lam": 1., "control": part, "start": start,
                                  "reinit_after": 10 ** 9}
                for part, start in parts.items() if run.flags.controls}
    compared(run, {**ABLATION, **controls}, judge.tell_ablation)


# ---- Backbones: DINO, features, probes (thesis 3.2) ---------------------------------------------

@command("images! window arch patch size=224 local-size local-crops global-scale local-scale blur "
         "colour standardise prototypes head-hidden bottleneck teacher-temp warmup-start momentum "
         "epochs=100 batch=512 lr=5e-4 warmup=10 weight-decay=0.04 decay-ssm workers "
         "preset seed=0 device log-every save-every overwrite resume out=runs/dino")
def cmd_dino(flags):
    """Pre-train a backbone on pictures without labels (DINO, thesis 3.2.1); labels, if there, only
    watch over it (k-NN). Under 20,000 pictures what is not typed is chosen for so few, and said;
    the defaults below are the thesis's (--preset thesis)."""
    run = Run(flags)
    images = pictures_of(run.flags)
    rows = images.rows("train")                              # all, where there is no split
    refuse(len(rows) < 2,
           f"{run.flags.images} has {len(rows)} picture to train on - give at least two")
    refuse(flags.preset not in (None, "thesis"), f"--preset {flags.preset} is of sae - use thesis")
    if not run.saved and not flags.preset and len(rows) < 20_000:
        chosen = ssm.dino_settings_for(len(rows), {k: flags[k] for k in flags.given})
        shown = ", ".join(f"{name.replace('_', '-')} {v}" for name, v in chosen.items())
        say(f"chosen for {len(rows)} pictures: {shown}")
        run.flags = flags.replaced(chosen)
    flags = run.flags
    torch.set_flush_denormal(True)                           # far tokens' gradients get that small
    torch.manual_seed(flags.seed)
    nets = ssm.dino_nets(**flags.pick("arch size patch prototypes head_hidden bottleneck decay_ssm "
                                      "device"))
    teacher = nets[1]
    for net in nets[:2] if flags.standardise else ():
        ssm.standardise_pixels(net, *data.pixel_statistics(images, rows), data.IMAGENET)
    with torch.no_grad():                                    # sizes that do not fit fail here
        teacher([torch.zeros(1, 3, side, side, device=flags.device)
                 for side in (flags.size, flags.local_size)])
    crops = data.Crops(flags.size, flags.local_size, flags.local_crops, flags.global_scale,
                       flags.local_scale, flags.blur, flags.colour)
    run.begin(data_hash=images.hash, pictures=len(images))
    watch, measure = watched(images, flags)                  # labels serve this alone
    others = {"random weights": watch(teacher.backbone), "raw pixels": watch()} if watch else {}
    log = train_dino(run, nets, images, crops, watch)
    page = judge.Page(f"repsae dino: {flags.arch}")
    run.tell(page, judge.tell_dino(page, log.rows, others, measure))


def pictures_of(flags):
    """The pictures that --images names, grey values as --window says."""
    images = noted(data.read_images(flags.images))
    images.window = flags.window
    return images


def train_dino(run, nets, images, crops, watch):
    """Train the `nets`, or go on training them; watch: of `watched`. Returns the Log."""
    flags, checkpoint, done = run.flags, run.path("checkpoint.pt"), 0
    if run.saved and os.path.exists(checkpoint):
        with unpacked(checkpoint, "is no checkpoint of this run", "train anew with --overwrite",
                      flags.device) as kept:
            done = ssm.restore_dino(nets, kept)
    batches = data.Batches(images.rows("train"), flags.batch, flags.seed, "samples", drop_last=True)
    epoch, n_steps = batches.epoch, flags.epochs * batches.epoch
    log = Log(run.path("log.csv"), done, ("loss", "entropy", "information", "knn"), gaps=("knn",))
    views = data.crop_batches(images, crops, batches, flags.seed, done, n_steps, flags.workers)

    def on_step(step, told):
        ended, knn = step % epoch == 0, ""
        if ended and watch and (step // epoch % -(-flags.epochs // 20) == 0 or step == n_steps):
            knn = watch(nets[1].backbone)                    # of the teacher, as in DINO
        keep(step, lambda: {"epoch": round(step / epoch, 3), **told, "knn": knn},
             lambda: f"loss {told['loss']:.3f}  information {told['information']:.2f}"
                     + (f"  k-NN {knn:.3f}" if knn else ""), log=ended)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - flags.workers))   # crops need cores of their own
    with Keeper(flags, n_steps, done, log, lambda step: judge.write_torch(
            checkpoint, {**ssm.dino_state(nets, step), "n_classes": None,
                         **flags.pick("arch size patch")})) as keep:
        ssm.fit_dino(nets, lambda step: next(views), n_steps, epoch, on_step, done, flags.seed,
                     lr=flags.lr * flags.batch / 256,                    # as DINO's: by the batch
                     **flags.pick("warmup warmup_start weight_decay momentum teacher_temp"))
    torch.set_num_threads(threads)
    return log


def watched(images, flags, most=4000):
    """(watch, its measure): watch(backbone) is how well the 20 nearest neighbours of pictures tell
    their labels, by raw pixels without a backbone. (None, None) where there is nothing to tell."""
    rows = [part[images.labelled[part]] for part in images.knn_rows(flags.seed, most)]
    tasks = judge.label_tasks(images.labels, *rows) if all(map(len, rows)) else []
    if not tasks:
        return None, None
    several = images.labels.ndim == 2                        # may hold at once
    measure, classes = ("AUC", 2) if several else ("balanced accuracy", len(images.label_names))

    def watch(backbone=None):
        x = [images.features(part, backbone, flags.size) for part in rows]
        return judge.judged_features(*x, tasks, rows, classes, ks=(20,))["20-NN"][measure]
    return watch, measure


@command("images! weights! window size standardise last tokens class-token whole balanced seed=0 "
         "device overwrite out=feats.npz")
def cmd_extract(flags):
    """Features of pictures by backbones: streams that `sparc` and `probe` read, in an .npz, or
    where --out does not end so in a folder of .npy, block by block."""
    images, made, tokens = pictures_of(flags), {}, "all" if flags.class_token else flags.tokens
    if flags.balanced:
        images = images.balanced(flags.seed)
    run = None if flags.out.endswith(".npz") and out_file(flags) else Run(flags)
    specs, captions = flags.weights.split(","), images.about.get("captions")
    models = [None if "=lsa:" in spec else load_backbone(spec, flags) for spec in specs]
    names = [spec.partition("=")[0] for spec in specs]
    for name in names:
        refuse(name in data.RESERVED or names.count(name) > 1 or not plain(name) or "/" in name,
               f"--weights {flags.weights}: '{name}' stands twice, or names no stream - rename it")
    for spec, loaded in zip(specs, models):
        if not loaded:                                       # what runs of N words tell of captions
            name, longest = spec.split("=lsa:")
            refuse(captions is None or tokens or longest not in ("1", "2", "3"), f"{spec} - "
                   "lsa:1 to lsa:3 (longest run of words) read captions, and have no tokens")
            made[name] = [data.latent_semantics(captions, images.rows("train"), int(longest))]
            continue
        (name, model), clip = loaded, hasattr(loaded[1], "clip")
        if flags.standardise and model.random:
            statistics = data.pixel_statistics(images, images.rows("train"))
            ssm.standardise_pixels(model, *statistics, data.IMAGENET)
        blocks = len(getattr(model, "blocks", "1"))
        refuse(flags.last > blocks and (tokens or blocks > 1),
               f"--last {flags.last}, but {name} can show {blocks} - give no more")
        how = {"tokens": tokens, "block": 16 if tokens else 256,             # T times the memory
               "whole": flags.whole or clip,                 # clip learns from whole pictures
               **({"last": flags.last} if blocks > 1 else {})}
        if clip and captions is not None and not tokens:     # both its encoders
            silent = captions == ""                          # these lack the stream
            made[f"{name}_txt"] = [np.where(silent[:, None], np.nan, model.read(captions).cpu())]
        see = functools.partial(images.blocks, backbone=model, size=model.side, **how)
        first, made[name + "_img" * clip] = next(see([0])), see(range(len(images)))
    about, streams = images.arrays(flags.out), {}
    if tokens is True:                                       # views are square
        about["grid"] = np.repeat(math.isqrt(first.shape[1]), 2)
    if run:                                                  # what is cut short keeps its labels
        run.begin(data_hash=images.hash).write({f"{key}.npy": a for key, a in about.items()})
    for s, blocks in made.items():                           # here the models see the pictures
        if run:
            judge.write_npy(run.path(f"{s}.npy"), blocks, len(images))
        streams[s] = data.Source(flags.out)[s] if run else np.concatenate([*blocks])
        say(f"{s}: {streams[s].shape}")
    if not run:
        judge.write_npz(flags.out, {**streams, **about})
    say(f"wrote {flags.out}")


def load_backbone(spec, flags, n_classes=0):
    """(name, model) of a spec as the help of --weights has it; of a run of clip see `load_clip`.

    With n_classes it gets a new head of so many, and may be a classifier of torchvision; else it
    has its file's. `made` of the model builds it again, `random` says whether its weights are,
    `side` is that of its pictures: the spec's, else --size, else what it learned from."""
    name, _, where = spec.partition("=") if "=" in spec else (spec, "", f"{spec}:random")
    arch, _, file = where.partition(":")
    refuse(not where or not plain(name) or "/" in name,      # it names files, too
           f"{spec} - write name=RUN, name=arch:FILE or name=arch:random, separated by commas")
    arch, _, sides = arch.partition("@") if file else (arch, "", "")
    patch, side = (value_of(FLAGS[flag][1], text, f"{spec}: {flag} {text}") if text else None
                   for flag, text in zip(("patch", "size"), sides.partition("@")[::2]))
    side = side or flags.get("size")
    made = {"arch": arch, "size": side if file == "random" else None,    # of any size
            "patch": patch, "n_classes": None}
    if not file:                                             # our own files say what they are
        if os.path.exists(os.path.join(where, "clip.pt")):
            return name, load_clip(where, flags.device, side)
        file = os.path.join(where, "checkpoint.pt") if os.path.isdir(where) else where
        refuse(not os.path.exists(file),
               f"no run or file at {where} - check it, or {name}=arch:FILE")
        with unpacked(file, "is no file of dino or finetune", f"write {name}=arch:FILE") as kept:
            made = {key: kept[key] for key in made}
            made["n_classes"], side = int(made["n_classes"] or 0), side or kept.get("side")
        for size in (made["size"], side):
            check_kinds({**made, "size": size}, file)
    made["n_classes"] = n_classes or made["n_classes"]
    torch.manual_seed(flags.seed)
    if made["arch"] in ssm.PRESETS or not n_classes:
        model = ssm.make_backbone(**made)
    else:
        made.update(size=side, patch=None)
        known = data.vision().models
        refuse(made["arch"] not in known.list_models(module=known), f"{made['arch']} is neither a "
               "preset of ssm.py nor a classifier of torchvision - try vit_micro, resnet18")
        model = known.get_model(made["arch"], num_classes=n_classes)
    model.made, model.random = made, file == "random"
    if not model.random:
        ssm.load_weights(model, file, new_head=bool(n_classes))
    refuse(patch not in (None, getattr(model, "patch", 0)), f"{spec} - {arch} has no such patches")
    usual = 224 if arch.startswith("dinov2") else getattr(model, "size", 224)    # thesis A.1.2
    model.side = side or made["size"] or usual               # a scan takes any size
    return name, model.eval().to(flags.device)


@command(f"{DATA} seed only json overwrite")
def cmd_probe(flags):
    """Linear probe and weighted k-NN on features: do they tell the labels apart (thesis 3.2.3)?"""
    features = read_to_train(flags)
    y, names = features.labels, features.label_names
    refuse(y is None, "the data has no labels, or is of tokens - add them as `labels`")
    wanted = flags.only.split(",") if flags.only else names
    chosen = sorted({label_number(features, name) for name in wanted})           # their numbers
    several = y.ndim == 2                                    # may hold at once: one by one
    whole = [features.has(s, np.arange(len(y))) for s in features.streams]       # of every stream
    known = np.flatnonzero(features.labelled & (several or np.isin(y, chosen)) & np.all(whole, 0))
    rows = [np.intersect1d(features.rows(*s), known) for s in (("train",), ("test", "val"))]
    train, test = rows
    tasks = judge.label_tasks(y[:, chosen] if several else np.searchsorted(chosen, y), *rows)
    refuse(not len(test) or not tasks or len(np.unique(tasks[0][train])) < 2,
           "fewer than two classes to learn, or nothing to test on - mend `split` or `labels`")
    for c in [] if several else np.setdiff1d(y[test], y[train]):
        raise InputError(f"no training sample has the label '{names[c]}' of test samples - mend "
                         "`split`, or name the others with --only")
    found, C = {}, 2 if several else len(chosen)             # has it or not, or which of them
    for s in features.streams:
        x = (features.batch(part)[s].numpy() for part in rows)
        found[s] = judge.judged_features(*x, tasks, rows, C, judge.logistic_probe)
    cells = [[f"{s}, {way}", *v.values()] for s in found for way, v in found[s].items()]
    print(judge.text_table(["", "accuracy", "balanced accuracy", "F1", "AUC"], cells))
    print(f"{len(train)} samples to learn from, {len(test)} to test on" + several
          * f"; mean over {len(tasks)} of {len(chosen)} labels, those that some have and some lack")
    return found


# ---- What latents are and do: CytoSAE, Mammo-SAE, the TotalSegmentator study, thesis 4.3 --------

@command(f"{ON_RUN} stream tau top weighted between names query label prompts sample token noisy "
         "eval-rows", "run")
def cmd_latents(flags):
    """What each latent is: frequency, mean, label entropy, reference samples, barcodes of patients
    (CytoSAE); with --token what is in a patch, with --query what words of --names find."""
    if flags.query:
        check_needed(flags, "names")
    refuse(flags.label and not flags.query, "--label judges a --query - give one")
    refuse("sample" in flags.given and flags.token is None, "--sample wants a --token - give one")
    run, *others = [flags.run] if os.path.exists(flags.run) else flags.run.split(",")
    refuse(others and {"prompts", "query", "token"} & flags.given, f"{flags.run} - name one run")
    flags = flags.replaced({"run": run})
    coded = Coded(run, flags)
    names = data.read_names(flags.names, coded.model.n_latents) if flags.names else {}
    one = len(coded.features.streams) == 1
    if one or others or {"prompts", "query", "between", "token"} & flags.given:
        coded.pool(flags.tau)                                # refuses several streams
    if flags.token is not None:
        return show_patch(coded, flags)
    if flags.prompts:
        return write_prompts(coded, flags.prompts, flags.top)
    if flags.query:
        return search(coded, names, flags)
    run, path = analysis_run(flags, "latents"), os.path.join(flags.run, "metrics.json")
    page = judge.Page(f"repsae latents: {os.path.basename(os.path.abspath(flags.run))}")
    known = data.read_json(path) if os.path.exists(path) else {}
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):   # it has no verdict
        judge.tell_verdict(page, known["verdict"])
    features, rows, shown = explored(coded.model, coded.features, coded.flags, names)
    page.explore(judge.explorer(features, rows, {"": shown}))
    files = {}
    if one:
        tables = {flags.run: trained_latents(coded, flags)}
        for name in others:
            other = Coded(name, flags).pool(flags.tau)
            refuse(other.features.hash != coded.features.hash, f"{name} is of other features than "
                   f"{flags.run} - compare runs of one stream of a file")
            tables[name] = trained_latents(other, flags)
        table, references = tables[flags.run], tables[flags.run].pop("references")
        judge.tell_latents(page, tables, len(coded.train), features.label_names)
        files = {**tell_barcodes(page, coded, table["mean"], flags.between), "latents.json": [
            {"latent": int(j), **judge.taken(table, j), "references": references[j]}
            for j in np.flatnonzero(table["frequency"])]}
    run.begin().write(files).tell(page)


def trained_latents(coded, flags):
    """What the latents are on training samples: `judge.latent_table`, with `references` a list of
    rows for each latent, best first."""
    train, known = coded.train, coded.features.labelled[coded.train]
    table = judge.latent_table(coded.strength[train], coded.count[train],
                               coded.features.label_matrix(train) if known.any() else None,
                               flags.top, flags.weighted, known)
    table["references"] = [train[ranks.indices[ranks.data.argsort()]].tolist()
                           for ranks in table["references"]]
    return table


def show_patch(coded, flags):
    """The latents that are active in a patch of a test sample, and where the two strongest are in
    their reference pictures, those left out that are nearly everywhere (CytoSAE Fig. 3)."""
    features, i, at = coded.features, flags.sample, flags.token
    refuse(not features.grid, f"{coded.flags.data} has no tokens with a grid - extract --tokens")
    refuse(i >= len(coded.test) or at >= coded.T, f"--sample {i} --token {at}, but there are "
           f"{len(coded.test)} test samples of {coded.T} tokens - count from 0")
    run, page = analysis_run(flags, f"patch_{i}_{at}"), judge.Page("repsae latents: a patch")
    table, row = trained_latents(coded, flags), coded.test[i]
    code = coded.codes([row])[coded.stream][at].toarray()[0]
    # the authors' measure, a mean activation above 0.1, depends on the features' units
    share = np.ravel(coded.count[coded.train].mean(0)) / coded.T
    noise = min(0.5, flags.noisy * share.mean())
    found = [j for j in np.argsort(-code, kind="stable").tolist() if code[j]]
    clear = [j for j in found if share[j] < noise][:2]
    page.table(["latent", "activation", "its mean", "share of all patches", "noisy"],
               [[j, code[j], table["mean"][j], share[j], "" if share[j] < noise else "yes"]
                for j in found], f"Patch {at} of test sample {i}, row {row}", "patch")
    if not clear:
        page.text(f"every latent here is in {noise:.3f} of all patches or more - raise --tau")
    shown = {j: table["references"][j] for j in clear}
    pictures = {r: features.picture(r) for r in [row, *itertools.chain(*shown.values())]}
    if clear and None not in pictures.values():
        (rows, columns), (y, x) = features.grid, divmod(at, features.grid[1])
        box = x / columns, y / rows, (x + 1) / columns, (y + 1) / rows
        page.picture("", judge.strips({
            f"The patch, and where latents {clear} are": [
                judge.heat_strip(pictures[row], [box], coded.heat(row, clear))],
            **{f"Latent {j} in the pictures where it is strongest": [
                judge.heat_strip(pictures[r], (), coded.heat(r, [j])) for r in shown[j]]
               for j in clear}}))
    run.begin().tell(page)


def tell_barcodes(page, coded, mean, between):
    """Tell the barcodes of groups (CytoSAE Eq. 4); returns the files to write, if any. Without
    groups each sample is one, if it has tokens and there are some 20,000 at most."""
    features, grouped = coded.features, "groups" in coded.features.about
    y = features.labels if np.ndim(features.labels) == 1 else None
    refuse(between and (y is None or not grouped), f"{coded.flags.data} has no groups, or no "
           "single label a sample - --between compares patients: add `groups` and `labels`")
    if y is None or not grouped and (coded.T == 1 or len(y) > 20000):
        return {}
    groups, codes, label = judge.barcodes(coded.count, coded.groups, y)    # a_p of Eq. 4
    known, names = label >= 0, np.array(features.label_names)
    pair = [label_number(features, name) for name in between.split(",")] if between else []
    refuse(between and (len(pair) != 2 or not np.isin(pair, label).all()),
           f"--between {between} - give two labels that groups have, a,b")
    n = np.unique(label[known], return_counts=True)[1]
    folds = data.stratified_parts(label[known], [1] * min(5, n.min()), coded.flags.seed) \
        if len(n) > 1 and n.min() > 1 else []
    page.text(f"{known.sum()} of {len(groups)} groups have one label, and count")
    means = judge.tell_barcodes(page, codes[known], label[known], names, mean, folds, pair)
    return {"barcodes.npz": {"groups": groups, "labels": label, "label_names": names,
                             "diseases": means, "format": b"csr", "shape": codes.shape,
                             **{k: getattr(codes, k) for k in ("data", "indices", "indptr")}}}


def write_prompts(coded, path, top):
    """For every latent the samples that show what it means, as JSON with a prompt for its name."""
    rng, out = np.random.default_rng([coded.flags.seed, 10]), []
    code = coded.strength[coded.train].tocsc()               # columns are cut out below
    for j in np.flatnonzero(code.getnnz(axis=0)):
        column = code[:, [j]].toarray().ravel()
        shown = {kind: [{**coded.about(coded.train[i]), "activation": float(column[i])}
                        for i in rows]
                 for kind, rows in judge.shown_samples(column, top, rng).items()}
        out.append({"latent": int(j), **shown, "prompt": judge.naming_prompt(shown)})
    judge.write_json(path, out)
    say(f'wrote {path}: {len(out)} latents; collect the answers in a file like '
        '{"17": "round nucleus"} for --names')


def search(coded, names, flags):
    """Tell what latents of fitting names find; with --label what is right, beside chance."""
    weights = judge.name_weights(flags.query, names)
    refuse(not weights, f"no name fits '{flags.query}' - try other words")
    best = sorted(weights.items(), key=lambda v: -v[1])[:10]
    print("latents: " + ", ".join(f"{j} '{names[j]}' {w:.2f}" for j, w in best))
    for row in judge.search(coded.strength, weights, coded.test)[:flags.top]:
        print("  " + ", ".join(f"{k} {v}" for k, v in coded.about(row).items()))
    if flags.label is not None:
        y, _, rows = coded.told(flags.label)
        right, control = judge.search_precision(coded.strength, weights, rows, y, names, flags.top,
                                                coded.flags.seed)
        print(f"precision at {flags.top} for '{flags.label}': {right:.3f}; with names shuffled "
              f"{judge.mean_std(control)}; share of all samples {y[rows].mean():.3f}")


@command(f"{ON_RUN} stream label iou other eval-rows=2000", "run")
def cmd_intervene(flags):
    """What latents do: with --label, keep or silence its top latents and see what a linear head
    still tells (Mammo-SAE); and how much few latents keep (the TotalSegmentator study)."""
    coded, label, named = Coded(flags.run, flags), None, "intervene"
    refuse(flags.label is None and {"iou", "other"} & flags.given,
           "--iou and --other have no effect without --label - give one")
    if flags.label is not None:
        label = label_number(coded.features, flags.label)
        named += re.sub(r"\W+", "_", f"_{coded.features.label_names[label]}")
    run = analysis_run(flags, named)
    page = judge.Page(f"repsae intervene: {flags.label or 'all labels'}")
    y, train, test = coded.pool().told(flags.label)
    if label is not None:
        means = judge.class_means(coded.strength[train], y[train])
        tell_interventions(page, coded, y > 0, train, test, means)
        tell_places(page, coded, label, test, means[1], flags.iou)
        pairs = {"--data": means}                            # name: (2, L); Mammo-SAE Fig. 4
        if flags.other:                                      # Eq. 2, too
            theirs = flags.replaced({"data": flags.other})
            theirs.given |= {"data"}
            other = Coded(flags.run, theirs).pool()
            known, rows, _ = other.told(flags.label)
            pairs["--other"] = judge.class_means(other.strength[rows], known[rows])
        page.records([{"class means of": name, **judge.separation(v)} for name, v in pairs.items()],
                     key="separation")
        for name, v in pairs.items():
            lines = {f"{name}, without the label": v[0], f"{name}, with it": v[1]}
            page.picture("", judge.latent_chart(lines, v.max(0), "mean activation"))
    tell_fidelity(page, coded, y, train, test, flags.eval_rows)
    run.begin().tell(page)


def tell_interventions(page, coded, y, train, test, means):
    """Tell what a linear head, fitted to the features, makes of them, of codes, and of their top
    latents alone or silenced (Mammo-SAE Eq. 3-4); means (2, L): of the classes."""
    head, of_class = judge.logistic_fit(coded.dense(train), y[train].astype(int), 2)  # (d, 2)
    w, bias = head[:, 1] - head[:, 0], float(of_class[1] - of_class[0])          # of the log odds
    effect, base = coded.W @ w, float(coded.b @ w) + bias
    scores = {"original features": coded.dense(test) @ w + bias,
              "reconstructed": coded.strength[test] @ effect + base}
    rows = [[name, *judge.bootstrap_auc(y[test], score, coded.groups[test], seed=coded.flags.seed)]
            for name, score in scores.items()]
    page.table(["95 in 100 bootstrap draws", "AUC", "from", "to"], rows, key="auc")
    curve = judge.intervention(coded.strength[test], effect, base, y[test], means)
    page.records(curve, "AUC with only the k top latents of each class kept, or with these "
                 "silenced", key="curve")
    page.picture("", judge.svg_lines(
        {what: [(i, c[what]) for i, c in enumerate(curve)] for what in ("keep", "silence")},
        "k of each class", "AUC on test samples", [str(c["k"]) for c in curve], zero=False))


def tell_places(page, coded, label, test, rank, iou):
    """Tell where the latents of highest `rank` (L,) for a label fire: average precision of their
    heat maps as detectors of its boxes (Mammo-SAE Table 2), and the maps of six pictures."""
    features, top = coded.features, np.argsort(-rank, kind="stable")[:10]
    page.metrics["top latents"] = top.tolist()
    if not features.grid:
        if features.boxes is not None:
            say("note: boxes but no token grid, so no latent is localised - extract with --tokens")
        return
    if features.boxes is not None:
        found = judge.localisation(top, (coded.heat(row, top) for row in test),
                                   [coded.boxes(row, label) for row in test], iou)
        page.records(found, f"Average precision at IoU {iou:g}", key="localisation")
    shown = {row: features.picture(row) for row in test[features.label_matrix(test)[:, label]][:6]}
    if None not in shown.values():
        page.picture("The top latents over pictures with the label; true boxes in red", "".join(
            judge.heat_strip(image, coded.boxes(row, label), coded.heat(row, top))
            for row, image in shown.items()))


def tell_fidelity(page, coded, y, train, test, eval_rows):
    """Tell how well codes rebuild features, what few latents tell of classes y (N,), if there are
    any, and whether codes find the neighbours that features find."""
    seed, dense = coded.flags.seed, coded.dense(np.arange(len(coded.features))).astype(float)
    r2 = judge.r2_both(dense[test], coded.strength[test] @ coded.W + coded.b)
    page.table(["of the features" + ", averaged over tokens" * (coded.T > 1), "R2"],
               list(r2.items()), "Reconstruction", key="r2")
    if y is not None:
        kept = judge.kept_performance(dense, coded.strength, y, train, test, seed=seed)
        page.records(kept["rows"], "Balanced accuracy of a linear probe on n latents", key="few")
        page.table(["all", "balanced accuracy"], list(kept["all"].items()), key="probe")
    some = np.sort(np.random.default_rng([seed, 4]).permutation(test)[:eval_rows or None])
    near = judge.retrieval_fidelity(dense[some], coded.strength[some], y if y is None else y[some],
                                    coded.groups[some])
    if not near:
        return say(f"note: {len(some)} test samples have no ten neighbours of other groups")
    page.records(near, "Neighbours of other groups", key="neighbours")


@command("data streams seed device json overwrite sparc", "run", "other")
def cmd_compare(flags):
    """Do two runs have latents in common? Best pairing, against shuffled samples and one code."""
    streams = (flags.streams or "").split(",") * 2
    a, b = (Coded(run, flags, s).pool() for run, s in zip((flags.run, flags.other), streams))
    runs, rows, page = [a, b], a.test, judge.Page("repsae compare")
    if flags.sparc:
        refuse(a.stream == b.stream, f"both runs are on '{a.stream}' - --sparc wants two streams")
        runs.append(Coded(flags.sparc, flags, f"{a.stream},{b.stream}"))
    for one in runs:
        refuse(len(one.features) != len(a.features), f"{a.run} has {len(a.features)} samples, "
               f"{one.run} has {len(one.features)} - compare runs on the same, or name a --data")
        rows = rows[np.all([one.features.has(s, rows) for s in one.features.streams], 0)]
    codes = {"the two runs, best pairing": (a.strength[rows], b.strength[rows])}
    for mode in ("joint", "alone") if flags.sparc else ():
        codes[f"SPARC {mode}, same latent"] = [
            judge.pool_tokens(code, runs[2].T)[0] for code in runs[2].codes(rows, mode).values()]
    found, shuffled = [], np.random.default_rng([a.flags.seed, 12]).permutation(len(rows))
    for name, (x, y) in codes.items():
        for what, z in ((name, y), (f"{name}, samples shuffled", y[shuffled])):
            r = judge.latent_correlations(x, z, "same" in name)
            found.append({f"{len(rows)} samples": what, **judge.latents_in_common(r)})
    page.records(found, key="shared")
    return page.metrics["shared"]


# ---- Images and words (thesis 5.3-5.4, A.3-A.4): tissue, a small CLIP, heat maps, retrieval -----

@command("pictures size=64 seed=0 overwrite out=tissue")
def cmd_tissue(flags):
    """Draw microscope-like pictures whose cells, captions, masks and diseases are known."""
    run, made = Run(flags), data.tissue(flags.pictures, flags.size, flags.seed)
    files = {name: Image.fromarray(content) if name.endswith("png") else content
             for name, content in data.tissue_files(made).items()}
    kinds = made["label_names"][:len(data.CELLS) + 1].tolist()
    sheet = [[Image.fromarray(pixels) for pixels in made["pixels"][has][:8]]
             for has in made["labels"].T[:len(kinds)]]
    files["sheet.png"] = judge.contact_sheet(sheet, [""] * 8, 96, kinds)
    run.begin().write(files)
    for name, n in zip(made["label_names"], made["labels"].sum(0)):
        print(f"{name}: in {n} pictures")
    say(f"wrote {run.join('tissue.npz')}, {flags.pictures} pictures, and sheet.png")


@command("images window weights merges size=64 patch=8 width layers joint context epochs=20 "
         "batch=128 lr=1e-3 seed=0 device overwrite out=runs/clip")
def cmd_clip(flags):
    """Train a small CLIP on pictures and captions (thesis 5.3.1), or import a released one."""
    if flags.weights:
        return import_clip(flags)
    images = pictures_of(flags)
    refuse("captions" not in images.about,
           f"{flags.images} has no captions - give an .npz with `images` and `captions`")
    captions = np.array([str(c) for c in images.about["captions"]])
    train, test = images.rows("train"), images.rows("test", "val")       # all, where none is split
    refuse(len(train) < flags.batch or len(test) < 2, f"{len(train)} pictures to train on, "
           f"{len(test)} to test - --batch {flags.batch} of the first are needed, and two to test")
    words = data.Merges(data.read_merges(flags.merges)) if flags.merges else \
        data.Words(captions[train])
    torch.manual_seed(flags.seed)
    tower = flags.width, flags.layers, math.gcd(flags.width, max(flags.width // 32, 1))  # heads
    model = ssm.CLIP(flags.joint, tower, tower, words.size, flags.context, flags.patch,
                     flags.size).to(flags.device)
    run = Run(flags).begin(pictures=len(images), data_hash=images.hash)
    pixels = images.views(range(len(images)), flags.size, whole=True)
    tokens = words(captions, flags.context, strict=False)    # (n, context), known words
    batches = data.Batches(train, flags.batch, flags.seed, "samples", drop_last=True)
    n_steps = flags.epochs * batches.epoch
    turns = np.random.default_rng(flags.seed).integers((4, 2), size=(n_steps, 2)).tolist()
    progress, log = Progress(n_steps), Log(run.path("log.csv"))

    def batch(step):                                         # a field has no upright side
        rows, (quarters, mirrored) = batches.rows(step), turns[step]
        x = torch.rot90(pixels[rows], quarters, (2, 3))
        return x.flip(3) if mirrored else x, tokens[rows]

    def on_step(step, told):
        if step % 20 == 0 or step == n_steps:
            log.add({"step": step, **told})
        progress(step, lambda: f"loss {told['loss']:.3f}")
    ssm.fit_clip(model, batch, n_steps, flags.lr, on_step)
    log.write()
    run.write({"clip.pt": {"model": model.state_dict(), "config": model.config,
                           "merges" if flags.merges else "words": words.words}})
    seen = images.features(test, model.visual, flags.size, whole=True)
    said = ssm.text_features(model, words, captions[test]).cpu().numpy()
    found = judge.retrieval({"image": seen, "text": said})
    page, part = judge.Page("repsae clip"), "test" if images.split is not None else "training"
    page.table([f"{len(test)} {part} pictures", *found["image -> text"]],
               [[pair, *v.values()] for pair, v in found.items()], key="test")
    page.write(run.path, {"loss": float(log.rows[-1]["loss"])})


def import_clip(flags):
    """A released CLIP as a run like our own: its weights, its tokenizer, and its first layer in our
    units of pixels."""
    check_needed(flags, "merges")
    words = data.Merges(data.read_merges(flags.merges))
    beside = os.path.join(os.path.dirname(flags.weights), "open_clip_config.json")
    quick, pixels = True, data.CLIP_PIXELS
    with unpacked(flags.weights, "is no state_dict of a CLIP",
                  "of OpenAI's files save torch.jit.load(FILE).state_dict()") as state:
        openai = "input_resolution" in state
        if os.path.exists(beside) and not openai:
            quick, pixels = data.read_open_clip(beside)
        elif not openai:
            say(f"note: nothing tells the GELU of {flags.weights}: OpenAI's QuickGELU is taken - "
                f"open_clip's own need {os.path.basename(beside)} there")
        model = ssm.clip_from_state(state, quick)
    refuse(words.size != model.config["vocab"], f"{flags.merges} makes {words.size} tokens, not "
           f"{model.config['vocab']} - give CLIP's bpe_simple_vocab_16e6.txt.gz")
    ssm.standardise_pixels(model.visual, *pixels, data.IMAGENET)
    run = Run(flags).begin().write({"clip.pt": {
        "model": model.state_dict(), "config": model.config, "merges": words.words}})
    say(f"wrote {run.join('clip.pt')}")


def load_clip(folder, device, side=None):
    """The image encoder of a run of clip; its .clip and .words are the whole model and tokenizer,
    its .read(captions) gives their features (n, d). side: of its pictures, if not its own."""
    with unpacked(os.path.join(folder, "clip.pt"), "is no readable clip.pt",
                  "train it again") as kept:
        model = ssm.CLIP(**kept["config"])
        model.load_state_dict(kept["model"])
        words = data.Merges(kept["merges"]) if "merges" in kept else data.Words(words=kept["words"])
    seen = model.eval().to(device).visual
    object.__setattr__(seen, "clip", model)                  # no submodule: the other way round
    seen.words, seen.random, seen.side = words, False, side or seen.size
    seen.read = functools.partial(ssm.text_features, model, words)
    return seen


@command(f"{ON_RUN} window images! weights! size label latent query least most seed=0", "run?")
def cmd_explain(flags):
    """Heat maps of backbones by Grad-CAM (thesis 3.2.4); given a run of sparc, of its concepts.

    With a run: in pixels and words, and what they segment (5.4.4, A.3-A.4); --most is then 400."""
    if flags.run is not None:
        return explain_concepts(flags)
    refuse({"query", "latent", "least"} & flags.given, "--query, --latent, --least - name a run")
    run, images, sheet = Run(flags, flags.out or "runs/cam"), pictures_of(flags), {}
    rows = range(0, len(images), max(1, len(images) // flags.most))[:flags.most]
    pictures = [images.open(i) for i in rows]
    for spec in flags.weights.split(","):
        name, model = load_backbone(spec, flags)
        x = images.views(rows, model.side, whole=True).to(flags.device)
        outputs = [str(i) for i in range(model(x[:1]).shape[1])]
        refuse(flags.label not in (None, *outputs), f"--label {flags.label}, but {name} has "
               f"{len(outputs)} outputs - give 0 to {outputs[-1]}")
        score = None if flags.label is None else lambda out: out[:, int(flags.label)]
        heat, _ = judge.grad_cam(model, *ssm.cam_layer(model, x), x, score)
        sheet[name] = [judge.overlay(p, h) for p, h in zip(pictures, heat)]
    run.begin(data_hash=images.hash).write({
        "sheet.png": judge.contact_sheet(list(zip(pictures, *sheet.values())), ["picture", *sheet]),
        **{f"{name}_{i}.png": picture for name, column in sheet.items()
           for i, picture in zip(rows, column)}})
    print(f"wrote {len(rows) * len(sheet)} heat maps and {run.join('sheet.png')}")


def explain_concepts(flags):
    """Point concepts of a SPARC run back at pixels and words, and measure what the maps segment."""
    run, seen = analysis_run(flags, "explain"), Concepts(flags)
    page, names = judge.Page("repsae explain: concepts in pixels and words"), seen.label_names
    chosen = chosen_latents(flags.latent, seen.J, seen.alive)
    texts = flags.query.split(",") if flags.query else []
    for text in texts:
        refuse(not seen.encoder.words.pieces(text), f"--query {flags.query} - give words, a,b")
    maps, shown = measured_maps(seen, page), {}
    for c in seen.there:                                     # two with it, named first, one without
        here = sorted((i for i, k in seen.truth if k == c),
                      key=lambda i: names[c] not in seen.captions[i])
        without = [i for i in seen.test if (i, c) not in seen.truth]
        shown.update({(i, c): i in here for i in here[:2] + without[:1]})
    seen.tell(page, "words", "Concepts of the labels", names, shown, maps,
              judge.indicator(seen.J, seen.model.n_latents).to(seen.flags.device))
    codes, asked = seen.codes(np.array(seen.test), "alone").values(), {}
    for c, j in enumerate(chosen):                           # test samples where all are strongest
        strength = sum(z / max(z.max(), 1e-12) for z in (code[:, [j]].toarray()[:, 0]
                                                         for code in codes))
        asked.update({(seen.test[n], c): bool(strength[n] > 0)
                      for n in np.argsort(-strength, kind="stable")[:4]})
    single = judge.indicator([[j] for j in chosen], seen.model.n_latents).to(seen.flags.device)
    seen.tell(page, "latents", "Single latents, where they are most active",      # thesis Fig. 5.4
              [f"latent {j}" for j in chosen], asked, seen.code_maps(single, asked), single)
    tell_texts(seen, page, texts)
    kept = {"keys": np.array(list(seen.truth))}
    for name, found in maps.items():
        if found:
            nothing = np.full_like(next(iter(found.values())), np.nan)   # of labels without latents
            kept[name] = np.stack([found.get(key, nothing) for key in seen.truth])
    run.begin().write({"maps.npz": kept}).tell(page)


class Concepts(Coded):
    """A run of sparc with the backbones that made its streams, and pictures with true masks.

    sees            {name: (backbone, its stream)} of --weights
    clip, encoder   the name of CLIP; its image encoder, with its .clip and .words
    text, pictured  the streams of its captions and pictures
    J, alive        each label's latents (`judge.concept_latents`); each stream's, active in
                    training
    truth, there    {(picture, label): bool mask} of the test pictures `test` that have any, and
                    their labels"""

    def __init__(self, flags):
        super().__init__(flags.run, flags)
        features, images = self.features, pictures_of(flags)
        self.images, self.label_names, n = images, features.label_names, len(features)
        if images.outlines is None and images.boxes is not None and len(images) == n:
            images.outlines = data.Source(flags.images).checked(
                "instances", f"(N, h, w) numbers of objects, N = {n}", (np.integer, n, None, None))
        refuse(images.outlines is None or len(images) != n, f"{flags.images} has no 'boxes' and "
               f"'instances' of {n} pictures - name what `tissue` made, or a COCO folder")
        refuse(images.label_names != self.label_names, f"{flags.images} has other labels than "
               f"{self.flags.data} - extract its features from these pictures")
        known = {*features.streams, *features.about, "labels" if self.label_names else ""}
        for name in {*self.model.streams, "captions", "labels"} - known:
            raise InputError(f"{self.flags.data} has no '{name}' - explain needs captions, labels "
                             "and all streams of the run")
        self.captions = features.about["captions"].astype(str).tolist()
        self.sees, clips = {}, []
        for spec in self.flags.weights.split(","):
            name, backbone = load_backbone(spec, self.flags)
            stream = name
            if hasattr(backbone, "clip"):
                stream = f"{name}_img"
                clips.append((name, backbone))
            refuse(stream not in self.model.dims,
                   f"the run has no stream '{stream}' - it has {', '.join(self.model.streams)}")
            without = not judge.kept_attention(backbone)     # attention: named by what it gets
            self.sees[name + " (Grad-CAM)" * without] = backbone, stream
        refuse([f"{name}_txt" in self.model.dims for name, _ in clips] != [True],
               f"{len(clips)} runs of clip in --weights - name the one of the run's text stream")
        (self.clip, self.encoder), = clips
        self.text, self.pictured = f"{self.clip}_txt", f"{self.clip}_img"
        train, most = features.rows("train"), flags.most if "most" in flags.given else 400
        chose = self.codes(train, "alone" if self.model.topk == "local" else "joint")
        self.J = judge.concept_latents(chose, features.label_matrix(train), flags.least,
                                       features.labelled[train])
        self.alive = {s: np.flatnonzero(code.getnnz(axis=0))
                      for s, code in self.codes(train, "alone").items()}
        self.test, self.truth = [], {}
        for i in features.rows("test", "val"):
            if len(self.test) < most and (found := self.images.masks(i)):
                self.test.append(i)
                self.truth.update({(i, c): mask for c, mask in found.items()})
        self.there = sorted({c for _, c in self.truth})
        refuse(not self.truth, f"no test picture of {flags.images} has an object - give others")

    def code(self, stream):
        """The function features (B, d) -> dense codes (B, L) of a stream alone."""
        model = self.model
        return lambda x: model.encode({stream: x}, "alone")[stream].dense(model.n_latents)

    def maps(self, backbone, score, asked, cam=False):
        """Of the pairs `asked`, (picture, c), the heat maps {pair: (h, w)} of score(features
        (B, d), numbers c (B,)) -> (B,), see `judge.heat_maps`, and the pairs whose score is 0."""
        maps, silent, pairs = {}, [], list(asked)
        layer = functools.partial(ssm.cam_layer, backbone)
        for at in range(0, len(pairs), 64):
            rows, c = map(list, zip(*pairs[at:at + 64]))
            x = self.images.views(rows, backbone.side, whole=True).to(self.flags.device)
            heats, values = judge.heat_maps(backbone, x, lambda f: score(f, c), layer, cam)
            maps.update(zip(pairs[at:], heats))
            silent += [pair for pair, value in zip(pairs[at:], values) if value == 0]
        return maps, silent

    def code_maps(self, weight, asked):
        """Of every backbone the maps of its code times row c of weight (n, L), for (picture, c); of
        one with attention by relevancy and by Grad-CAM, as thesis A.3 has both."""
        found = {}
        for name, (backbone, s) in self.sees.items():
            score = judge.weighted_code(self.code(s), weight)
            found[name], _ = self.maps(backbone, score, asked)
            if judge.kept_attention(backbone):
                found[f"{name} (Grad-CAM)"], _ = self.maps(backbone, score, asked, cam=True)
        return found

    def tell(self, page, key, title, names, asked, maps, weight):
        """Tell the maps of pairs `asked`, {(picture, c): is it there?}, and what each word of the
        pictures' captions adds to the code weighted by row c of weight (n, L), where that is not 0.
        """
        score = judge.weighted_code(self.code(self.text), weight)
        words = [{"concept": names[c], "caption": self.captions[i], "here": here, "words":
                  judge.word_heat(self.encoder.clip, self.encoder.words, self.captions[i],
                                  lambda f: score(f, [c]))}
                 for (i, c), here in asked.items() if weight[c].any()]
        gallery = judge.map_gallery(maps, asked, names, self.images.open)
        page.picture(title, gallery + judge.word_table(words) or "<p>No latent of a label is alive "
                     "in every stream; --latent names others.</p>")
        page.metrics[key] = words


def chosen_latents(text, J, alive):
    """The latents of --latent; without it, of each label the first that is alive in every stream,
    three at most. alive: {stream: its living latents}."""
    if text is None:
        shared = [functools.reduce(np.intersect1d, [mine, *alive.values()]) for mine in J]
        return sorted({int(v[0]) for v in shared if len(v)})[:3]
    living = set(map(str, np.concatenate(list(alive.values()))))
    for j in text.split(","):
        refuse(j not in living, f"--latent {text}: {j} is no latent that a stream has alive - give "
               "numbers of others, separated by commas")
    return [int(j) for j in text.split(",")]


def measured_maps(seen, page):
    """Tell what heat maps segment, the maps of each backbone for the targets of Table 5.4 and of
    CLIP's own similarity to a label's name; returns them, {name: {(picture, label): (h, w)}}."""
    for c in seen.there:
        seen.encoder.words.pieces(seen.label_names[c])       # raises InputError for an unknown word
    prompts, unit = seen.encoder.read(seen.label_names), torch.nn.functional.normalize
    z_names = seen.code(seen.text)(prompts).detach()         # (C, L), what names are coded as
    pairs = list(itertools.product(seen.test, seen.there))   # is the label in the picture or not
    maps, middle = {}, dict.fromkeys(pairs, judge.centre_prior())
    found = {"centre of the picture": judge.map_scores(middle, seen.truth, data.otsu)}

    def measure(name, backbone, score, possible=seen.there):
        maps[name], silent = seen.maps(backbone, score, [p for p in pairs if p[1] in possible])
        found[name] = judge.map_scores(maps[name], seen.truth, data.otsu, silent)

    def together(stream, f, c):                              # picture and name choose the support
        both = seen.model.encode({stream: f, seen.text: prompts[c]}, "joint").values()
        return math.prod(codes.dense(seen.model.n_latents) for codes in both).sum(1)
    for name, (backbone, s) in seen.sees.items():
        targets = judge.concept_scores(seen.code(s), z_names, seen.J, seen.alive[s],
                                       seen.flags.seed)
        for target, how in targets.items():
            measure(f"{name}, {target}", backbone, *how)
        if seen.model.topk != "local":
            measure(f"{name}, similarity to the name, joint", backbone,
                    functools.partial(together, s))
    measure(f"{seen.clip}, raw similarity", seen.encoder, judge.weighted_code(unit, unit(prompts)))
    page.records([{f"{len(seen.test)} pictures, {len(seen.truth)} masks": name, **v}
                  for name, v in found.items()], key="segmentation", title="Segmentation by heat "
                 "maps: of the labels that are there, as published, and of all")
    return maps


def tell_texts(seen, page, texts, most=4):
    """Similarity of pictures to their own captions (thesis A.4.1), and of those that fit the first
    of some free `texts` best to each of these (Fig. A.14-15): by z^s . z^t, and by CLIP."""
    test, unit = np.array(seen.test), torch.nn.functional.normalize
    z = seen.code(seen.pictured)(seen.features.batch(test)[seen.pictured].to(seen.flags.device))

    def tell(key, title, names, texts, asked, weight=None):
        said = seen.encoder.read(texts)
        z_texts = seen.code(seen.text)(said).detach()
        maps = seen.code_maps(z_texts, asked)
        maps["cosine, CLIP itself"], _ = seen.maps(
            seen.encoder, judge.weighted_code(unit, unit(said)), asked)
        seen.tell(page, key, title, names, asked, maps, z_texts if weight is None else weight)
    first = test[:most].tolist()
    tell("captions", "Pictures with their captions: similarity z . z' of the two",
         [f"picture {i}" for i in first], [seen.captions[i] for i in first],
         {(i, n): True for n, i in enumerate(first)}, z[:most].detach())
    if texts:
        z_first = seen.code(seen.text)(seen.encoder.read(texts[:1]))[0]
        best = [int(test[n]) for n in (z @ z_first).argsort(descending=True)[:most].tolist()]
        tell("query", "Free words: similarity z . z' of pictures and captions to each", texts,
             texts, {(i, n): True for n in range(len(texts)) for i in best})


@command(f"{ON_RUN} streams sample from to query features encoder", "run")
def cmd_retrieve(flags):
    """Show what a sample of streams finds in others: the ten nearest codes, joint and alone, and
    their pictures (thesis Fig. 5.6-5.7, A.16-29). --from and --to take several streams, a,b."""
    coded = Coded(flags.run, flags)
    features, streams, flags = coded.features, coded.model.streams, coded.flags
    sources = (flags["from"] or streams[0]).split(",")
    targets = (flags.to or streams[-1]).split(",")
    for s in (*sources, *targets):
        refuse(s not in features.streams,
               f"no stream '{s}' - the run and its data have {', '.join(features.streams)}")
    given = flags.query is not None or flags.features is not None
    rows, own = features.rows("test", "val"), flags.sample
    for s in {*targets} if given else {*sources, *targets}:
        rows = rows[features.has(s, rows)]
    refuse(not given and own >= len(rows),
           f"--sample {own} - give one of the {len(rows)} held-out samples, from 0")
    run = analysis_run(flags, f"retrieve_{'+'.join(sources)}_{'+'.join(targets)}_"
                       f"{'given' if given else own}")
    page = judge.Page("repsae retrieve" + f": {flags.query}" * bool(flags.query))
    for mode in ("alone",) if given else ("joint", "alone"):
        codes, partner = coded.codes(rows, mode), ""
        for source, target in itertools.product(sources, targets):
            title = f"{source} to {target}, {mode}"
            query = given_query(coded.model, source, flags) if given else codes[source][[own]]
            if not query.nnz:
                page.text(f"{title}: no latent is active in the query, so that nothing is near it")
                continue
            (near,), (similar,) = judge.nearest(query, codes[target], len(rows))
            if not given:
                rank = (similar >= similar[near == own]).sum()
                partner = f"the true partner has rank {rank} of {len(rows)}; "
            page.text(f"{title}: {partner}nearest samples {rows[near[:10]].tolist()}")
            shown = [*map(features.picture, rows[[*[own] * (not given), *near[:10]]])]
            if None not in shown:
                page.picture("", judge.strips({"": [judge.embedded(v, 120) for v in shown]}))
            found = [{**coded.about(i), "cosine": r} for i, r in zip(rows[near[:10]], similar)]
            page.records(found, title, quiet=True)
    run.begin().tell(page)


def given_query(model, stream, flags):
    """The code (1, L) in `stream` of --query, read by the text encoder of --encoder, or of the row
    --sample of the file --features."""
    if flags.query is not None:
        refuse(not stream.endswith("_txt"),
               f"--query cannot ask in '{stream}' - name the text stream with --from")
        check_needed(flags, "encoder")
        encoder = load_clip(flags.encoder, flags.device)
        refuse(not encoder.words.pieces(flags.query), "--query has no words - give some")
        asked, row = data.Features({stream: encoder.read([flags.query]).cpu().numpy()}), 0
    else:
        asked, row = data.read_features(flags.features, [stream]), flags.sample
        refuse(row >= len(asked), f"--sample {row}, but {flags.features} has {len(asked)} samples "
               "- count from 0")
    shape = asked.streams[stream].shape[1:]
    refuse(shape != (model.dims[stream],), f"the query has {'x'.join(map(str, shape))} numbers, "
           f"stream '{stream}' has {model.dims[stream]} - name its stream with --from")
    return token_codes(model, asked, [row], "alone")[stream]


# ---- Slides and bags (thesis 3.2.2) -------------------------------------------------------------

@command("images voc window size downsample threshold smallest rois overwrite out=tiles")
def cmd_tile(flags):
    """Find the tissue of slides and lay tiles over it: for each slide a file of coordinates and an
    overview. With --voc cut boxes out of pictures, into class folders by its splits."""
    if flags.voc:
        cuts, side = data.cut_boxes(flags.voc, window=flags.window), flags.size or 64
        names = [f"{name}.png" for name in cuts.about["ids"]]
        for i, path in enumerate(Run(flags).begin().paths(names)):
            judge.save_picture(path, cuts.open(i).resize((side, side), Image.BICUBIC))
        for name, n in zip(*np.unique([*map(os.path.dirname, names)], return_counts=True)):
            print(f"{name}: {n}")
        return
    check_needed(flags, "images")
    slides, size, run = noted(data.read_slides(flags.images)), flags.size or 224, Run(flags)
    names, of_each = slides.about["groups"].tolist(), os.path.isdir(flags.rois or "")
    files = [os.path.join(flags.rois, f"{name}.xml") if of_each else flags.rois for name in names]
    there = {file for file in files if file and (not of_each or os.path.exists(file))}
    refuse(flags.rois and (not there or not of_each and len(slides) > 1), f"--rois {flags.rois} "
           "annotates no slide - name one slide and its file, or a folder of NAME.xml")
    if of_each and (others := {*glob.glob(glob.escape(flags.rois) + "/*.xml")} - there):
        say(f"note: no slide has the name of {', '.join(sorted(others)[:3])}")
    regions = [data.read_polygons(file) if file in there else [] for file in files]
    side = round(size * flags.downsample)
    for i, name in enumerate(names):
        boxes, shown = data.tile_slide(slides.paths[i], side, least=flags.smallest,
                                       window=flags.window, threshold=flags.threshold)
        if not run.about:                                    # an unreadable slide leaves nothing
            run.begin()
        out = run.join(f"{name}.npz")
        tiles = data.slide_tiles(slides, i, boxes, regions[i] if flags.rois else None)
        run.write({f"{name}.npz": tiles.arrays(out), f"{name}.png": shown})
        inside = f", {tiles.labels.sum()} of them in the regions" if flags.rois else ""
        print(f"{out}: {len(tiles)} tiles of {side} pixels{inside}")


@command("data! stream head widths attention dropout instances subtyping epochs=200 patience=20 "
         "min-epochs batch=1 lr=2e-4 cosine weight-decay=1e-5 balanced folds votes seed=0 device "
         "overwrite out=runs/mil")
def cmd_mil(flags):
    """Multiple-instance learning: bags of instances to labels. Bags of a validation part stop the
    training early; where there is none, as in folds, all epochs are trained."""
    heads = flags.head.split(",")
    for head in heads:
        refuse(head not in ssm.HEADS, f"--head {head} - take one or more of {', '.join(ssm.HEADS)}")
    bags = data.read_bags(flags.data, flags.stream)
    rounds = bags.rounds(flags.folds, flags.seed, flags.data)
    if not len(rounds[0][1]) and {"patience", "min_epochs"} & flags.given:
        say("note: no bags to validate by, so that --patience and --min-epochs have no effect")
    make = {**flags.pick("attention dropout"), "widths": [*map(int, flags.widths.split(","))]}
    run = Run(flags).begin(bags=len(bags), rounds=len(rounds), data_hash=bags.hash)
    page, log = judge.Page("repsae mil"), Log(run.path("log.csv"))
    progress = Progress(len(heads) * len(rounds))
    y, C, mean = bags.y, len(bags.label_names), np.stack([x.mean(0, dtype=float) for x in bags.x])
    found = {"mean of the bag, logistic": [
        judge.scores(y[test], judge.logistic_probe(mean[train], y[train], mean[test], C, 0.01))
        for train, _, test in rounds]}
    for head in heads:
        found[head] = []
        for r, parts in enumerate(rounds):
            scores, models = mil_round(bags, {"head": head, **make}, flags, r, *parts)
            found[head].append(scores)
            log.add({"head": head, "round": r + 1, **scores})
            progress(len(log.rows), lambda: head)
        log.write()
        if len(rounds) == 1:
            run.write({f"{head}.pt": {
                "models": [model.state_dict() for model in models], "head": head,
                "dim": bags.x[0].shape[1], "label_names": bags.label_names, **make}})
            page.picture(f"Attention of {head} over test slides",
                         attention_maps(bags, models, rounds[0][2], head, run))
    names = ("AUC", "accuracy", "F1")
    page.table(["head", *names], [[head, *(judge.mean_std([v[name] for v in scores])
                                           for name in names)] for head, scores in found.items()])
    page.text(f"{len(rounds)} test part{'s' * (len(rounds) > 1)} of about {len(rounds[0][2])} "
              "bags; mean ± standard deviation over them")
    run.tell(page, found)


def mil_round(bags, make, flags, r, train, val, test):
    """Scores, on bags `test`, of the mean vote of models `make`, arguments of `ssm.MIL`, that learn
    from bags `train`, each from its own weights, and stop by bags `val` if there are any; and the
    models. r: the number of the round."""
    models, p = [], 0

    def batches(rows, size=flags.batch):
        return [[v.to(flags.device) for v in bags.padded(rows[i:i + size])]
                for i in range(0, len(rows), size)]
    for vote in range(flags.votes):
        rng = np.random.default_rng([flags.seed, r, vote])
        torch.manual_seed(int(rng.integers(2 ** 62)))
        model = ssm.MIL(bags.x[0].shape[1], len(bags.label_names), **make)
        model.mean, model.std = bags.scale(train)            # of no bag that is reported
        ssm.fit_mil(model.to(flags.device),
                    lambda epoch: batches(bags.drawn(train, rng, flags.balanced)), batches(val),
                    k=flags.instances, least=flags.min_epochs,
                    **flags.pick("epochs lr weight_decay patience cosine subtyping"))
        with torch.no_grad():
            logits = torch.cat([model(x, mask)[0] for x, mask, _ in batches(test, 1)])
        p = p + logits.softmax(1).cpu().numpy() / flags.votes  # the mean vote
        models.append(model.cpu())
    return judge.scores(bags.y[test], p), models


def attention_maps(bags, models, rows, head, run, most=6):
    """Test slides with each tile coloured by its share in the bag, as files
    heat_<label>_<slide>_<head>.png and as HTML."""
    shown, there = {}, bags.coords and bags.images
    for i in [i for i in rows if there and bags.coords[i] is not None and bags.images[i]][:most]:
        label, (x, _, _) = bags.label_names[bags.y[i]], bags.padded([i])
        heat = sum(model(x)[1].softmax(-1)[0].mean(0) for model in models).detach().numpy()
        image, scale = data.Slide(bags.images[i]).overview(1024)
        picture = judge.box_overlay(image, bags.coords[i], heat, scale)
        run.write({f"heat_{label}_{bags.names[i]}_{head}.png": picture})
        shown[f"{bags.names[i]}: {label}"] = judge.embedded(image), judge.embedded(picture)
    return judge.strips(shown) or "<p>The bags name no pictures.</p>"


# ---- Transfer learning (thesis 3.3) -------------------------------------------------------------

@command("images! label weights=vit_micro,vim_micro,vmamba_micro,resnet18 split runs size=224 "
         "epochs=50 patience=10 batch=32 lr=1e-4 weight-decay=0.05 seed=0 window "
         "device overwrite out=runs/finetune")
def cmd_finetune(flags):
    """Fine-tune classifiers over several seeds, and test which is better than which."""
    seen = functools.cache(lambda side: data.read_pictures(flags.images, side, flags.label,
                                                           flags.window))
    pictures = noted(seen(flags.size))
    C, n, specs, sizes = len(pictures.label_names), flags.runs, {}, {}
    for spec in flags.weights.split(","):
        name, model = load_backbone(spec, flags, C)
        refuse(name in specs, f"--weights {flags.weights} names a model twice - write "
               "a=vit_micro:random,b=vit_micro:random")
        ssm.last_linear(model)                               # refuses what ends in none
        out = torch.zeros(1, 3, model.side, model.side, device=flags.device)
        with contextlib.suppress(RuntimeError, AssertionError), torch.no_grad():
            out = model(out)                                 # sizes that do not fit fail here
        refuse(not isinstance(out, torch.Tensor) or out.shape != (1, C), f"{name} does not "
               f"classify pictures of {model.side} pixels - choose another --size or another model")
        specs[name], sizes[name] = spec, sum(p.numel() for p in model.parameters())
    rounds = [data.picture_parts(pictures, flags.split, flags.seed + r, flags.images)
              for r in range(n)]
    run = Run(flags).begin(pictures=len(pictures.labels), data_hash=pictures.hash)
    log, progress = Log(run.path("log.csv")), Progress(len(specs) * n)
    pixels = pictures.about["images"].transpose(0, 3, 1, 2)
    baseline = [judge.pixel_probe(pixels, pictures.labels, parts, C) for parts in rounds]
    found = {"pixels, logistic": baseline, **{name: [] for name in specs}}
    for i, (name, r) in enumerate([(name, r) for name in specs for r in range(n)], 1):
        one = flags.replaced({"seed": flags.seed + r})       # new weights and order each run
        model = load_backbone(specs[name], one, C)[1]
        scores, history = finetune_one(seen(model.side), model, one, *rounds[r])
        found[name].append(scores)
        for epoch, (loss, held) in enumerate(history, 1):
            log.add({"model": name, "run": r + 1, "epoch": epoch, "loss": loss, "validation": held})
        log.write()
        progress(i, lambda: f"{name}, run {r + 1}: AUC {scores['AUC']:.3f}")
        if r == 0:                                           # the file that `explain` reads
            run.write({f"{name}.pt": {"model": model.state_dict(), "side": model.side,
                                      **model.made}})
    page = judge.Page("repsae finetune")                     # thesis 3.3.3
    judge.tell_models(page, found, list(specs))
    run.tell(page, {"parameters": sizes, "test pictures": len(rounds[0][2])})


def finetune_one(pictures, model, flags, train, val, test):
    """Train a classifier, stop by the validation loss, judge the best epoch on the test rows:
    (scores, history)."""
    torch.set_flush_denormal(True)
    torch.manual_seed(flags.seed)
    x, y = data.normalised(pictures.about["images"]), torch.from_numpy(pictures.labels)

    def batches(epoch):
        order = np.random.default_rng([flags.seed, epoch]).permutation(train)    # new each epoch
        for rows in torch.from_numpy(order).split(flags.batch):
            if len(rows) > 1 or flags.batch == 1:            # batch normalisation needs two
                yield data.jittered(x[rows]).to(flags.device), y[rows].to(flags.device)

    def plainly(rows):                                       # in order, unchanged
        for part in torch.from_numpy(rows).split(256):
            yield x[part].to(flags.device), y[part].to(flags.device)
    history = ssm.fit_classifier(model, batches, lambda: plainly(val), flags.epochs, flags.lr,
                                 flags.weight_decay, flags.patience)
    with torch.no_grad():
        p = torch.cat([torch.softmax(model(x), 1) for x, _ in plainly(test)])
    return judge.scores(pictures.labels[test], p.cpu().numpy()), history


# ---- Commands that live in tests/ ---------------------------------------------------------------

def in_tests(name):
    """The module tests/`name`.py."""
    sys.modules.setdefault("repsae", sys.modules[__name__])  # it imports this one, no second
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests"))
    return importlib.import_module(name)


@command("seed=0 seeds quick out=demo")
def cmd_demo(flags):
    """The whole thesis on a laptop, on made-up tissue; tests/thesis.py says what is asked."""
    in_tests("thesis").demo(os.path.normpath(flags.out), flags.quick, flags.seed, flags.seeds)


@command("json device overwrite", "what?")
def cmd_bench(flags):
    """Speed and memory: `sparc` (a step), `rows` (memory-mapped folders), `scan`, `backbones`,
    `page` (report.html at its largest)."""
    what = flags.what or "all"
    value_of("all|sparc|rows|scan|backbones|page", what, f"bench {what}")
    return in_tests("bench").run(what, flags.device)


# ---- The command line ---------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, with our one line for its errors."""

    def error(self, message):
        message = re.sub("^argument (--[^ :]+): ", r"\1 ", message)
        raise InputError(f"{message} - see python repsae.py "
                         f"{' '.join(self.prog.split()[1:] + ['--help'])}")


def parse(argv):
    """argv -> (command function, Flags). argparse finds the words, `value_of` what they mean."""
    parser = Parser(prog="repsae", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    subs = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, each in COMMANDS.items():
        add_command(subs, name, each)
    refuse(any("\0" in word for word in argv or ()),         # no file can be named so
           "a NUL character on the command line - leave it out")
    typed = vars(parser.parse_args(argv))
    each = COMMANDS[typed["command"]]
    for word in " ".join(typed.pop("set", [])).split():
        name, _, text = word.partition("=")
        mine = [n for n in each.flags if n in SETTINGS]
        refuse(name not in mine, f"--set {word}: no such setting - take one of {mine or 'none'}")
        typed[name] = text
    for flag, default in each.flags.items():
        if isinstance(text := typed.get(flag), str):         # not of a switch, on or off
            said = f"--set {flag}={text}" if flag in SETTINGS else f"--{flag} {text}"
            typed[flag] = value_of(FLAGS[flag][1], text, said, default)
    flags = Flags({name.replace("-", "_"): v for name, v in {**each.flags, **typed}.items()})
    flags.given = frozenset(name.replace("-", "_") for name in typed) - {"command"}
    if not flags.get("resume") or not os.path.exists(os.path.join(flags.out, "config.json")):
        check_needed(flags)                                  # else the run there has them
    return each, flags


def check_needed(flags, *names):
    """Raise InputError when one of the flags `names`, else of those needed, was not given."""
    for name in names or sorted(COMMANDS[flags.command].needed):
        refuse(not flags[name.replace("-", "_")],
               f"--{name} is missing - see python repsae.py {flags.command} --help")


def add_command(subs, name, each):
    """A sub-command's parser, its help in groups."""
    about = inspect.cleandoc(each.__doc__)
    settings = [f"{flag}={default}  {SETTINGS[flag][2]}"
                for flag, default in each.flags.items() if flag in SETTINGS]
    sub = subs.add_parser(
        name, help=about.split("\n")[0], description=about,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings, for --set:\n  " + "\n  ".join(settings) if settings else None)
    helps = {"add": "a run folder, or codes of encode", "bench": "all by default",
             "latents": "a run folder, or several, a,b, to compare sizes"}
    for what in each.positional:
        sub.add_argument(what.strip("?"), nargs="?" if "?" in what else None,
                         help=helps.get(name, "a run folder"))
    actions = {"switch": argparse.BooleanOptionalAction, "settings": "append"}
    for title, table in GROUPS.items():
        group = sub.add_argument_group(title)
        for flag in [flag for flag in table if flag in each.flags or flag == "set" and settings]:
            default, (_, kind, text) = each.flags.get(flag), FLAGS[flag]
            option = {"metavar": kind} if "|" in kind else {"action": actions.get(kind, "store")}
            if flag in each.needed:
                text += " (needed)"
            elif kind != "switch" and default not in (None, "auto"):
                text += f" (default: {str(default).strip('[]')})"
            group.add_argument(f"--{flag}", dest=flag, help=text.replace("%", "%%"),
                               default=argparse.SUPPRESS, **option)      # only what was typed


def say(text):
    """A line for the user on stderr: results alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


say_once = functools.cache(say)                              # the same line once in a process


def resuming(flags, more=""):
    """The command that goes on with a run, and with what is `more`."""
    base = f"{shlex.quote(flags.run)} " if flags.get("run") else ""
    return f"python repsae.py {flags.command} {base}--resume{more} --out {shlex.quote(flags.out)}"


def fail(text):
    """End as every user error does: one line of at most 400 characters, exit code 2. Of a longer
    one the middle goes, since its end says what to do."""
    printable = "".join(c if c.isprintable() else " " for c in f"repsae: error: {text}")
    line = " ".join(printable.split())
    say(line if len(line) <= 400 else f"{line[:260]} ... {line[-130:]}")
    raise SystemExit(2)


def perform(run, flags):
    """Run a command on a device that torch can use; what it returns are figures for --json."""
    try:
        if PROCESSES > 1:                                    # meet the others
            refuse(flags.command != "sparc",
                   f"{flags.command} runs in one process - leave torchrun out")
            gpu = flags.device.startswith("cuda")
            if gpu:                                          # each takes that of its own number
                flags["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(flags.device)
            torch.distributed.init_process_group("nccl" if gpu else "gloo")
        torch.zeros(1, device=flags.get("device") or "cpu")
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0][:60]
        raise InputError(f"device '{flags.device}' cannot be used ({why}...) - try cpu")
    for name in flags:                                       # before hours of work, not after
        if flags[name] and name in FLAGS and FLAGS[name][1] == "file":
            out_file(flags, name)
    with (open(os.devnull, "w") as nowhere,
          contextlib.redirect_stdout(nowhere if RANK else sys.stdout),
          contextlib.redirect_stderr(nowhere if RANK else sys.stderr)):
        figures = run(flags)
    if flags.get("json"):
        judge.write_json(flags.json, figures)
        say(f"wrote {flags.json}")


def main(argv=None):
    """Run the command that argv names. What a user can mend ends in `fail`; bugs of ours do not."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")    # names of files need not be text
    try:
        run, flags = parse(argv)
        perform(run, flags)
    except KeyboardInterrupt as e:
        if isinstance(e, Interrupted):
            say(f"\n{e}; go on with: {resuming(flags)}")
        raise SystemExit(130)
    except MemoryError:
        fail("there is not enough memory for this - lower the sizes, or take fewer samples")
    except OSError as e:                                     # no space, no permission, no place
        where = e.filename or flags.get("out") or flags.get("export")
        fail(f"{e.strerror or e}: {where} - mend it, or name another place")
    except ValueError as e:
        if type(e).__name__ != "InputError":
            raise
        if RANK:                                             # the first mostly says the same, and
            time.sleep(10)                                   # torchrun then ends the rest
        fail(e)
    except RuntimeError as e:
        if PROCESSES == 1 or not re.search("onnection|peer|NCCL|timed out", str(e)):
            raise
        if RANK:                                             # the first says it
            raise SystemExit(2)
        fail(f"another process of this run ended - go on with {resuming(flags)}")
    finally:
        Run.release()


if __name__ == "__main__":
    main()
