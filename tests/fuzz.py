"""What does repsae do with damaged files and odd flags? `python tests/fuzz.py --inputs 5000 --seed 0`.

Small valid inputs for every command are made once (`make_zoo`). Then each numbered input takes a command line that works
(CASES), damages a flag or a file that it uses, and runs it in a forked process, which has its own copy of everything, 20
seconds and 4 GB. What may come of it: the command runs, or refuses in one line and exit code 2. All else is a finding:
a traceback, a hang, memory, a longer message, a half-written file.

Input N of a seed is always the same: `--repeat N` shows it, and `--only COMMAND` leaves the other commands out.
"""
import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
import zipfile
import zlib

os.environ["OMP_NUM_THREADS"] = "1"                          # before torch: a fork may not inherit threads
import numpy as np
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import repsae

SECONDS, GIGABYTES = 20, 4
FINDINGS = ("traceback", "bad message", "hang", "over 4 GB", "half-written")
COLUMNS = ("inputs", "refused", "ran", *FINDINGS)

FIT = "--latents 12 --k 2 --batch 16 --epochs 1"
SMALL_DINO = ("--arch vit_micro --patch 8 --size 16 --local-size 8 --local-crops 1 --prototypes 8 "
              "--head-hidden 8 --bottleneck 4 --batch 4 --epochs 1 --warmup 0 --workers 0")
SMALL_CLIP = "--size 16 --patch 8 --width 8 --layers 1 --joint 4 --context 8 --epochs 1 --batch 8"
SMALL_MIL = "--head gated --widths 4 --attention 2 --epochs 2 --least 1 --batch 4 --inner 1"
SMALL_TUNE = "--models vit_micro --size 16 --patch 8 --runs 1 --epochs 1"
WEIGHTS = "--weights vit=vit_micro:random,clip=clip"

# Command lines that make the inputs of the others, in this order.
MAKE = [
    "tissue --pictures 48 --size 16 --out tissue",
    f"dino --images pics {SMALL_DINO} --out dino",
    f"clip --images tissue/tissue.npz {SMALL_CLIP} --out clip",
    f"extract --images tissue/tissue.npz {WEIGHTS} --last 1 --size 16 --out feats.npz",
    f"sparc --data f.npz {FIT} --out sparc",
    f"sae --data f.npz --stream x {FIT} --out sae",
    f"sae --data tok.npz --norm none {FIT} --out tokens",
    f"sparc --data feats.npz {FIT} --out world",
    f"finetune --data pics --models v=vit_micro:random --size 16 --patch 8 --runs 1 --epochs 1 --out tuned",
    "tile --images slide.png --size 16 --least 0.001 --out tiles",
]
# Command lines that work, of which each input damages one; "o" is where they write.
CASES = [case.split() for case in [
    f"sparc --data f.npz --taxonomy taxonomy.json {FIT} --out o",
    f"sparc --data folder --streams x,y {FIT} --norm standard --out o",
    "sparc --data f.npz --resume --out sparc",
    f"sae --data f.npz --stream y --activation relu {FIT} --out o",
    "sae --data tok.npz --resume --out tokens",
    f"variants --data f.npz --stream x {FIT} --out o",
    "eval sparc --json o.json",
    "eval sparc --data folder --json o.json",
    "encode sparc --data f.npz --out o.npz",
    "encode tokens --mode joint --out o.npz",
    f"ablate --data f.npz --no-null {FIT} --out o",
    f"sweep --data f.npz --over k=2,4 {FIT} --out o",
    f"sweep --data f.npz --over streams=x+y {FIT} --out o",
    "latents tokens --between well,sick --out o",
    "latents sae --data f.npz --top 3",
    "intervene tokens --label sick --rank boxes --out o",
    "intervene tokens --label 1 --head head.npz --other tok.npz --out o",
    "fidelity tokens --label sick --out o",
    "describe tokens --top 2 --out o.json",
    "search tokens --names names.json --query nucleus --label sick",
    "search tokens --names names.json --embeddings emb.npz",
    "compare sae tokens --data f.npz --stream x --stream-b x --json o.json",
    "compare sae sae --json o.json",
    "tissue --pictures 8 --size 16 --out o",
    f"clip --images tissue/tissue.npz {SMALL_CLIP} --out o",
    f"clip --images tissue/tissue.npz {SMALL_CLIP} --merges merges.txt --out o",
    f"attribute world --images tissue/tissue.npz {WEIGHTS} --least 1 --most 2 --out o",
    "retrieve world --query 1 --from vit --to clip_txt --out o.html",
    "retrieve world --text mucin --encoder clip --from clip_txt --to clip_img --out o.html",
    "retrieve world --features q.npy --from clip_img --to vit --out o.html",
    f"dino --images pics {SMALL_DINO} --out o",
    "dino --images pics --resume --out dino",
    "extract --images pics --weights d=dino --out o.npz",
    f"extract --images tissue/tissue.npz {WEIGHTS},lsa=lsa:2 --last 1 --size 16 --out o.npz",
    "extract --images voc --weights d=dino --tokens --out o.npz",
    "extract --images tiles/slide.npz --weights v=tuned/v.pt --size 16 --out o.npz",
    "probe --data f.npz --json o.json",
    "probe --data feats.npz --solver sgd --only lymphocyte",
    "cut --voc voc --size 8 --out o",
    "tile --images slide.png --size 16 --least 0.001 --rois rois.xml --out o",
    "tile --images slide.png --size 16 --least 0.001 --otsu --out o",
    f"mil --data bags.npz {SMALL_MIL} --out o",
    f"mil --data bags {SMALL_MIL} --grid lr=0.01 --out o",
    f"finetune --data pics {SMALL_TUNE} --out o",
    f"finetune --data med.npz {SMALL_TUNE} --split given --out o",
    f"finetune --data tissue/tissue.npz --label mucin {SMALL_TUNE} --frozen --out o",
    "explain cam --images pics --weights d=dino,t=tuned/v.pt --most 1 --size 16 --out o",
    "demo --quick --skip 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20 --out o",
    "bench sparc --json o.json",
]]
COMMANDS = sorted({case[0] for case in CASES})
# Files that a command reads though its command line does not name them.
BEHIND = {"sparc": ["f.npz"], "sae": ["f.npz"], "tokens": ["tok.npz"], "world": ["feats.npz"],
          "tissue/tissue.npz": ["tissue/images/00001.png"], "tiles/slide.npz": ["slide.png"]}


# -- valid inputs ----------------------------------------------------------------------------------

def make_zoo(folder):
    """All inputs of CASES, in `folder`."""
    os.chdir(folder)
    rng = np.random.default_rng(0)
    features, tokens = feature_file(rng), token_file(rng)
    np.savez("f.npz", **features)
    np.savez("tok.npz", **tokens)
    os.mkdir("folder")
    for key in ("x", "y", "labels", "split"):
        np.save(f"folder/{key}.npy", features[key])
    parents = {"all": None, "thing": "all", **dict.fromkeys("abc", "thing")}
    pathlib.Path("taxonomy.json").write_text(json.dumps(parents))
    pathlib.Path("names.json").write_text(json.dumps({str(i): f"nucleus {i}" for i in range(12)}))
    pathlib.Path("merges.txt").write_text("#version\na b\nc d</w>\n")
    np.savez("emb.npz", latents=np.arange(12), vectors=rng.random((12, 4)), query=rng.random(4))
    np.savez("head.npz", weight=rng.random(6), bias=0.)
    np.save("q.npy", rng.random(4).astype(np.float32))
    make_pictures(rng)
    make_bags(rng)
    for line in MAKE:
        repsae.main(line.split())


def feature_file(rng, n=40):
    return {"x": rng.random((n, 6), np.float32), "y": rng.random((n, 5), np.float32),
            "labels": rng.random((n, 3)) < 0.5, "label_names": np.array(list("abc")),
            "groups": np.arange(n) // 2, "captions": np.array([f"cell {i % 3}" for i in range(n)]),
            "ids": np.array([f"id{i}" for i in range(n)]),
            "split": np.where(np.arange(n) < 25, "train", "test")}


def token_file(rng, n=40):
    sick = np.flatnonzero(np.arange(n) % 2)
    boxes = np.stack([sick, np.ones_like(sick), *np.zeros((2, len(sick))), *np.full((2, len(sick)), .5)], 1)
    return {"x": rng.random((n, 4, 6), np.float32), "labels": np.arange(n) % 2, "grid": np.array([2, 2]),
            "label_names": np.array(["well", "sick"]), "groups": np.arange(n), "boxes": boxes,
            "images": np.array(["pics/train/a/0.png"] * n),
            "split": np.where(np.arange(n) < 25, "train", "test")}


def make_pictures(rng):
    """Class folders, a Pascal VOC folder, a MedMNIST file, a slide and its annotation."""
    for split, n in (("train", 6), ("test", 3)):
        for name in "ab":
            os.makedirs(f"pics/{split}/{name}")
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(f"pics/{split}/{name}/{i}.png")
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        os.makedirs(f"voc/{part}")
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(f"voc/JPEGImages/{i}.jpg")
        box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), (4, 4, 20, 24)))
        pathlib.Path(f"voc/Annotations/{i}.xml").write_text(
            f'<?xml version="1.0" encoding="utf-8"?><annotation><object><name>n{i % 2}</name>'
            f"<bndbox>{box}</bndbox></object></annotation>")
    pathlib.Path("voc/ImageSets/Main/trainval.txt").write_text("0\n1\n")
    pathlib.Path("voc/ImageSets/Main/test.txt").write_text("2\n3\n")
    np.savez("med.npz", **{f"{s}_images": rng.integers(0, 255, (8, 8, 8, 3), np.uint8) for s in data.SPLITS},
             **{f"{s}_labels": np.arange(8)[:, None] % 2 for s in data.SPLITS})
    slide = np.full((96, 128, 3), 245, np.uint8)
    slide[8:88, 8:120] = np.array([220, 150, 180]) + rng.integers(-8, 8, (80, 112, 3))
    Image.fromarray(slide).save("slide.png")
    corners = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>'
                      for i, (x, y) in enumerate(((0, 0), (60, 0), (60, 90), (0, 90))))
    pathlib.Path("rois.xml").write_text(
        '<?xml version="1.0"?><A><Annotation PartOfGroup="_0"><Coordinates>'
        f"{corners}</Coordinates></Annotation></A>")


def make_bags(rng, n=24):
    """Bags in one file and in class folders."""
    folds = np.arange(n)[None, None] % 3 > 0
    np.savez("bags.npz", X=rng.random((3 * n, 4)), offsets=3 * np.arange(n + 1), y=np.arange(n) % 2, folds=folds)
    for i in range(n):
        os.makedirs(f"bags/{'ab'[i % 2]}", exist_ok=True)
        np.savez(f"bags/{'ab'[i % 2]}/{i}.npz", x=rng.random((3, 4), np.float32))


# -- damage ----------------------------------------------------------------------------------------

# No absolute path but where nobody can write: the commands do write where they are told to.
TEXTS = ["", " ", "nan", "inf", "-inf", "-1", "0", "0.5", "1e400", str(10 ** 12), str(2 ** 64), "x", "a\nb",
         "a\0b", "\udcff", "y" * 5000, "../x", ".", "/proc/x", ",", "=", ":", "a=b", "x=dino:",
         "lr=", "lr=x", "k=0", "\u00b2", "\u0661", "None", "--", "-", "1,2", "\x1b[1m", "f.npz", "pics", "sparc",
         "fifo", "slide.png", "taxonomy.json", "loop"]


def damage_flags(argv, rng):
    """A command line with one or two words of it replaced, doubled, left out or added."""
    argv = list(argv)
    for _ in range(rng.choice([1, 1, 1, 2])):
        at, how = rng.randrange(1, len(argv) + 1), rng.random()
        if how < 0.4:
            argv[at:at] = [f"--{rng.choice(flags_of(argv[0]))}", rng.choice(TEXTS)]
        elif how < 0.8:
            argv[at:at + 1] = [rng.choice(TEXTS)]
        elif how < 0.9:
            del argv[at:at + 1]
        else:
            argv[at:at] = argv[at:at + 2]
    return argv


FLAGS = {}


def flags_of(command):
    """The names of a command's flags, as its help tells them."""
    if command not in FLAGS:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            repsae.main([command, "--help"])
        FLAGS[command] = sorted(set(re.findall(r"--([a-z][a-z-]*)", shown.getvalue())) - {"help"})
    return FLAGS[command]


def files_used(argv):
    """Every file that the words of a command line name, those in folders and those behind them too."""
    words = [w for word in argv for w in re.split("[=,:]", word) if w and os.path.exists(w)]
    words += [path for word in words for path in BEHIND.get(word, ())]
    found = [os.path.join(where, f) for word in words for where, _, files in os.walk(word) for f in files]
    return sorted({*found, *filter(os.path.isfile, words)})


def damage_file(path, rng):
    """Replace a file by a damaged one; returns what was done."""
    kinds = {".npz": damage_npz, ".npy": damage_npy, ".json": damage_json, ".csv": damage_text, ".txt": damage_text,
             ".xml": damage_text, ".pt": damage_pt, ".png": damage_picture, ".jpg": damage_picture}
    how = rng.choice([damage_bytes, damage_place, *[kinds.get(os.path.splitext(path)[1], damage_bytes)] * 4])
    return how.__name__, path, how(path, rng)


def damage_bytes(path, rng):
    raw = bytearray(pathlib.Path(path).read_bytes())
    at, n = rng.randrange(len(raw) + 1), rng.choice([1, 4, 64, 1000])
    how = rng.choice(["truncate", "flip", "zero", "insert", "empty"])
    if how == "flip":
        for i in range(min(n, len(raw))):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif how == "zero":
        raw[at:at + n] = bytes(len(raw[at:at + n]))
    else:
        raw = {"truncate": raw[:at], "insert": raw[:at] + rng.randbytes(n) + raw[at:], "empty": b""}[how]
    pathlib.Path(path).write_bytes(raw)
    return how


def damage_place(path, rng):
    """Something else where a file belongs."""
    other = pathlib.Path(rng.choice(["f.npz", "slide.png", "taxonomy.json", "sparc/checkpoint.pt"])).read_bytes()
    os.remove(path)
    how = rng.choice(["missing", "folder", "fifo", "loop", "null", "other"])
    if how == "folder":
        os.mkdir(path)
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "other":
        pathlib.Path(path).write_bytes(other)
    elif how != "missing":
        os.symlink({"loop": os.path.basename(path), "null": "/dev/null"}[how], path)
    return how


def odd_array(x, rng):
    """(what was done, an array that is not quite what x was)."""
    flat = np.array(x).reshape(-1)
    spoiled = np.array(x, copy=True).reshape(-1)
    if spoiled.size and spoiled.dtype.kind in "fiub":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # a value that does not fit wraps round
            value = np.array(rng.choice([np.nan, np.inf, 1e30, -1e30, -1, 0, 1e8, 3e9]))
            spoiled[rng.randrange(spoiled.size):] = value.astype(spoiled.dtype)
    made = {"value": spoiled.reshape(np.shape(x)), "0-d": np.array(flat[0] if flat.size else 0),
            "empty": np.array(x)[:0], "flat": flat, "deeper": np.array(x)[..., None], "shorter": np.array(x)[1:],
            "object": np.array([{}, 1], object), "text": np.full(np.shape(x), "a\nb\ud800"),
            "bytes": np.full(np.shape(x), b"\xff"), "float": np.zeros(np.shape(x)), "half": np.ones(np.shape(x), "f2"),
            "int": np.full(np.shape(x), rng.choice([-1, 0, 1, 10 ** 8, 2 ** 62])), "bool": np.ones(np.shape(x), bool),
            "complex": np.ones(np.shape(x), complex), "time": np.zeros(np.shape(x), "M8[s]"),
            "uint8": np.ones(np.shape(x), np.uint8), "long": np.ones(np.shape(x), np.longdouble),
            "record": np.zeros(np.shape(x), [("a", "f4")]), "void": np.zeros(np.shape(x), "V3"),
            "big-endian": np.ones(np.shape(x), ">f4")}
    return (name := rng.choice(sorted(made))), made[name]


def npy_bytes(x, rng):
    """(what was done, the bytes of an .npy with an odd array or an odd header)."""
    name, out = "header", io.BytesIO()
    if rng.random() < 0.7:
        name, x = odd_array(x, rng)
        np.save(out, x, allow_pickle=True)
        return name, out.getvalue()
    np.save(out, x)
    header = rng.choice(["(1000000000000, 4)", "(-1,)", "(2,)", "()", "3", "None", "(True,)", "(" * 900, "'"])
    text = f"{{'descr': '{rng.choice(['<f4', '|O', '<U7', 'x', '<f99'])}', 'fortran_order': False, 'shape': {header}, }}\n"
    raw = out.getvalue()
    version = rng.choice([1, 1, 1, 2, 3, 9])
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return name, raw[:6] + bytes([version, 0]) + size + text.encode() + raw[128:]


def damage_npy(path, rng):
    name, raw = npy_bytes(np.load(path), rng)
    pathlib.Path(path).write_bytes(raw)
    return name


def damage_npz(path, rng):
    """One array of the file, or the way that it is packed."""
    with np.load(path) as z:
        arrays = dict(z)
    key = rng.choice(sorted(arrays))
    how = rng.choice(["array"] * 8 + ["drop", "rename", "foreign", "packing", "reserved"])
    members = {f"{k}.npy": npy_of(v) for k, v in arrays.items()}
    if how == "array":
        how, members[f"{key}.npy"] = npy_bytes(arrays[key], rng)
    elif how == "reserved":
        members[f"{rng.choice([*data.RESERVED, 'training', '_parameters', 'a.b', 'x'])}.npy"] = npy_of(arrays[key])
    elif how == "foreign":
        members[rng.choice(["readme.txt", "x", "../x.npy", "\u00e9.npy", ".npy", "labels", "q"])] = b"hello"
    elif how != "packing":
        content = members.pop(f"{key}.npy")
        members.update({rng.choice([f"{key}2.npy", "a\nb.npy", "<b>.npy", "k" * 500 + ".npy"]): content}
                       if how == "rename" else {})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.2 else zipfile.ZIP_STORED) as z:
        for name, content in members.items():
            z.writestr(name, content)
    if how == "packing":                                     # a method or a flag (encrypted) that Python does not know
        raw = pathlib.Path(path).read_bytes()
        offset, value = rng.choice([(10, 9), (10, 97), (10, 12), (8, 1), (24, 255)])
        at = raw.rindex(b"PK\1\2") + offset
        pathlib.Path(path).write_bytes(raw[:at] + bytes([value]) + raw[at + 1:])
    return key, how


def npy_of(x):
    out = io.BytesIO()
    np.save(out, x)
    return out.getvalue()


def spoil(tree, rng, values):
    """A tree of dicts and lists with one node replaced, left out or added; returns (path to the node, new tree)."""
    if isinstance(tree, (dict, list)) and tree and rng.random() < 0.8:
        tree = tree.copy()
        key = rng.choice(sorted(tree, key=str)) if isinstance(tree, dict) else rng.randrange(len(tree))
        if rng.random() < 0.15:
            del tree[key]
            return [key, "left out"], tree
        if isinstance(tree, dict) and rng.random() < 0.1:
            tree[rng.choice(["", "a\nb", "-1", "99", "\ud800"])] = tree[key]
            return [key, "added"], tree
        where, tree[key] = spoil(tree[key], rng, values)
        return [key, *where], tree
    value = rng.choice(values)(tree) if callable(values[0]) else rng.choice(values)
    return [repr(value)[:40]], value


def damage_json(path, rng):
    tree = json.loads(pathlib.Path(path).read_text())
    where, how = "whole", rng.random()
    if how < 0.15:
        text = rng.choice(["{}", "[]", "null", "3", '"x"', "NaN", "{", "", "[" * 30000 + "]" * 30000, "\ufeff{}",
                           '{"a": "b", "b": "a"}', '{"a": ' * 3000 + "1" + "}" * 3000, deep_taxonomy(), deep_nesting()])
    else:
        where, tree = spoil(tree, rng, [{}, [], None, True, 0, -1, 1.5, 10 ** 12, float("nan"), "", "x", "a\nb", "/",
                                        "\ud800", [[1]], {"a": 1}, "y" * 3000, 2 ** 70])
        text = json.dumps(tree)
    pathlib.Path(path).write_text(text, errors="replace")
    return where


def deep_taxonomy(n=20000):
    return json.dumps({"n0": None, **{f"n{i + 1}": f"n{i}" for i in range(n)}})


def deep_nesting(n=300):
    return '{"LabelName": "a", "Subcategory": [' * n + '{"LabelName": 3}' + "]}" * n


def damage_text(path, rng):
    """Lines of a CSV file, a list or an XML file."""
    text = pathlib.Path(path).read_text()
    words = re.findall(r"[\w.]+", text)
    old = rng.choice(words or [""])
    new = rng.choice(["", "nan", "x", "-1", "1e400", "../../../evil", "\0", "a b", "\u00e9", '"', "<", "utf-16", "klingon",
                      "utf-7", "9" * 400, "&a;", "\n"])
    text = text.replace(old, new, rng.choice([1, -1])) if rng.random() < 0.8 else text + rng.choice(["\n\n", "x", ",,,\n1"])
    pathlib.Path(path).write_bytes(text.encode() + rng.choice([b"", b"", b"\xff"]))
    return old, new


def damage_pt(path, rng):
    tree = torch.load(path, weights_only=True)
    where, tree = spoil(tree, rng, [
        lambda v: None, lambda v: "x", lambda v: {}, lambda v: [], lambda v: -1, lambda v: 10 ** 12, lambda v: 0.5,
        lambda v: torch.zeros(3, 0), lambda v: v.double() if isinstance(v, torch.Tensor) else True,
        lambda v: v * float("nan") if isinstance(v, torch.Tensor) else 0, lambda v: torch.ones(2, 2, dtype=torch.int8),
        lambda v: v.reshape(-1)[:1] if isinstance(v, torch.Tensor) else "global"])
    torch.save(tree, path)
    return where


def damage_picture(path, rng):
    how = rng.choice(["mode", "huge", "small", "cut", "text", "gif"])
    image = Image.open(path).convert("RGB")
    if how == "mode":
        how = rng.choice(["1", "L", "P", "CMYK", "RGBA", "LA", "I", "I;16", "F", "YCbCr"])
        image = image.convert("I" if how == "I;16" else "RGB").convert(how)
        image.save(path, "PNG" if how in ("1", "L", "P", "RGBA", "LA") else "TIFF")
    elif how == "huge":                                      # a PNG that declares what it does not hold
        image.save(path, "PNG")
        raw = bytearray(pathlib.Path(path).read_bytes())
        raw[16:24] = struct.pack(">II", *rng.choice([(9000, 9000), (10 ** 6, 10 ** 6), (0, 5), (2 ** 31 - 1, 1)]))
        raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
        pathlib.Path(path).write_bytes(raw)
    elif how == "small":
        image.resize((1, rng.choice([1, 3]))).save(path)
    elif how == "cut":
        raw = pathlib.Path(path).read_bytes()
        pathlib.Path(path).write_bytes(raw[:rng.randrange(8, len(raw))])
    else:
        image.save(path, "GIF") if how == "gif" else pathlib.Path(path).write_text("hello")
    return how


# -- one input -------------------------------------------------------------------------------------

def prepare(number, seed):
    """Damage the zoo in the working directory as input `number` says: (argv, what was damaged)."""
    rng = random.Random(f"{seed} {number}")
    argv = rng.choice([case for case in CASES if case[0] == command_of(number)])
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    used = files_used(argv)
    if rng.random() < 0.35 or not used:
        return damage_flags(argv, rng), "flags"
    ending = rng.choice(sorted({os.path.splitext(path)[1] for path in used}))
    return argv, damage_file(rng.choice([path for path in used if path.endswith(ending)]), rng)


def command_of(number):
    return COMMANDS[number % len(COMMANDS)]


def child(number, seed, zoo, place):
    """In a process of its own: run the input in a copy of the zoo, `place`/zoo; its words go to `place`/err and /told."""
    shutil.copytree(zoo, f"{place}/zoo", symlinks=True)
    os.chdir(f"{place}/zoo")
    before = {path: os.stat(path) for path in outputs()}
    argv, damage = prepare(number, seed)
    pathlib.Path(f"{place}/told").write_text(f"{argv}\n{damage}", errors="replace")
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{place}/{name}", os.O_CREAT | os.O_WRONLY), stream.fileno())
    size = int(re.search(r"VmSize:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + GIGABYTES * 2 ** 30,) * 2)
    # of `bench` and `demo` only what they do with their flags counts
    subprocess.run = lambda *_, **__: types.SimpleNamespace(returncode=0)
    repsae.run_stage = lambda *_: sys.exit(0)
    signal.alarm(SECONDS)
    code = 0
    try:
        repsae.main(argv)
    except SystemExit as e:
        code = e.code or 0
    except BaseException as e:
        traceback.print_exc()
        frames = [f for f in traceback.extract_tb(e.__traceback__) if str(ROOT) in f.filename] or [None]
        at = frames[-1] and f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}:{frames[-1].name}"
        pathlib.Path(f"{place}/at").write_text(f"{at}: {type(e).__name__}: {str(e)[:90]!r}", errors="replace")
        code = 1
    signal.alarm(0)
    broken = [path for path in outputs() if path not in before and not whole(path)]
    pathlib.Path(f"{place}/broken").write_text("\n".join(broken), errors="replace")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def outputs():
    return [os.path.join(where, f) for where, _, files in os.walk(".") for f in files
            if f.endswith((".npz", ".json", ".tmp", ".pt"))]


def whole(path):
    """Whether a file that a command has written can be read."""
    try:
        if path.endswith(".npz"):
            with np.load(path) as z:
                return [z[key] for key in z] is not None
        if path.endswith(".json"):
            return json.loads(pathlib.Path(path).read_text()) is not None
        return not path.endswith(".tmp") and torch.load(path, weights_only=True) is not None
    except Exception:                                        # whatever it is: nobody can read it
        return False


def verdict(status, usage, place):
    """(column of the table, where or what) of a process that has ended."""
    read = {name: pathlib.Path(f"{place}/{name}") for name in ("err", "at", "broken")}
    read = {name: path.read_text(errors="replace") if path.exists() else "" for name, path in read.items()}
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if re.search(r"^(step \d+/|before training)", read["err"], re.M):
            return "ran", "still training"
        return ("hang", "") if number == signal.SIGALRM else ("traceback", f"signal {number}")
    if usage.ru_maxrss > GIGABYTES * 2 ** 20 or re.search("MemoryError|can't allocate memory|Unable to allocate", read["err"]):
        return "over 4 GB", read["at"]
    if read["at"]:
        return "traceback", read["at"]
    if read["broken"]:
        return "half-written", read["broken"]
    if os.WEXITSTATUS(status) == 0:
        return "ran", ""
    lines = read["err"].splitlines()
    errors = [line for line in lines if line.startswith("repsae: error: ")]
    fine = os.WEXITSTATUS(status) == 2 and len(errors) == 1 and lines[-1] == errors[0] and len(errors[0]) <= 400
    return ("refused", errors[0]) if fine else ("bad message", "\n".join(lines[-3:])[:300])


def run_inputs(numbers, seed, zoo, jobs, until, show):
    """Run inputs by number, `jobs` at once, until the clock says `until`; calls show(number, column, what, place)."""
    running, numbers = {}, iter(numbers)
    while True:
        while len(running) < jobs and time.time() < until and (number := next(numbers, None)) is not None:
            place = tempfile.mkdtemp(dir=os.path.dirname(zoo))
            if not (pid := os.fork()):
                try:
                    child(number, seed, zoo, place)
                except BaseException:                        # a fault of this file; never two parents
                    traceback.print_exc()
                os._exit(99)
            running[pid] = number, place
        if not running:
            return
        pid, status, usage = os.wait3(0)
        number, place = running.pop(pid)
        show(number, *verdict(status, usage, place), place)
        shutil.rmtree(place, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--only", choices=COMMANDS, help="leave the other commands out")
    parser.add_argument("--repeat", type=int, help="run this one input and show what it says")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = collections.defaultdict(collections.Counter)
    places, began = collections.defaultdict(list), time.time()

    def show(number, column, what, place):
        table[command_of(number)].update([column, "inputs"])
        if column in FINDINGS:
            places[column, what].append(number)
        if args.repeat is not None:
            print(*(pathlib.Path(f"{place}/{name}").read_text(errors="replace") for name in ("told", "out", "err")),
                  sep="\n")
            print(column, what)
    numbers = range(args.inputs) if args.repeat is None else [args.repeat]
    numbers = [n for n in numbers if args.only in (None, command_of(n))]
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None                              # the zoo is copied for each input
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        zoo = os.path.join(folder, "zoo")
        os.mkdir(zoo)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_zoo(zoo)
        run_inputs(numbers, args.seed, zoo, args.jobs, began + args.seconds, show)
        os.chdir(ROOT)
    print(f"{'':12}" + "".join(f"{name:>13}" for name in COLUMNS))
    for command, row in [*sorted(table.items()), ("all", sum(table.values(), collections.Counter()))]:
        print(f"{command:12}" + "".join(f"{row[name]:13}" for name in COLUMNS))
    for (column, what), found in sorted(places.items(), key=lambda item: -len(item[1])):
        print(f"{len(found)} x {column}: {what} (inputs {', '.join(map(str, found[:5]))})")
    print(f"{time.time() - began:.0f} s")
    raise SystemExit(bool(places))


if __name__ == "__main__":
    main()
