"""What do damaged files and odd flags end in? `python tests/fuzz.py --inputs 5000 --seed 0`.

Small valid inputs for every command are made once (`make_zoo`). Then each numbered input takes a
command line that works (CASES), damages a flag or a file that it uses, and runs it in a forked
process with its own copy of everything, 20 seconds and 4 GB. It may run, or refuse in one line and
exit code 2; all else is a finding. Input N of a seed is always the same: `--repeat N` shows it, and
`--only COMMAND` leaves the other commands out.
"""
import argparse
import collections
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forks inherit no threads
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import repsae

PATIENCE, SECONDS, GIGABYTES = 20, 60, 4     # until it is asked to stop, and until it is a hang
FINDINGS = ("traceback", "bad message", "hang", "over 4 GB", "half-written")
COLUMNS = ("inputs", "refused", "ran", *FINDINGS)

FIT = "--latents 12 --k 2 --batch 16 --epochs 1"
SMALL_DINO = ("--arch vit_micro --patch 8 --size 16 --local-size 8 --local-crops 1 --prototypes 8 "
              "--head-hidden 8 --set bottleneck=4 --batch 4 --epochs 1 --warmup 0 --workers 0")
SMALL_CLIP = ("--size 16 --patch 8 --width 8 --set layers=1 --set joint=4 --set context=8 --epochs 1 "
              "--batch 8")
SMALL_MIL = "--head gated --widths 4 --attention 2 --epochs 2 --min-epochs 1 --batch 4 --votes 1"
SMALL_TUNE = "--weights vit_micro --size 16 --runs 1 --epochs 1"
WEIGHTS = "--weights vit=vit_micro:random,clip=clip"

# Command lines that make the inputs of the others, in this order.
MAKE = [
    "tissue --pictures 48 --size 16 --out tissue",
    f"dino --images pics {SMALL_DINO} --out dino",
    f"clip --images tissue/tissue.npz {SMALL_CLIP} --out clip",
    f"extract --images tissue/tissue.npz {WEIGHTS} --size 16 --out feats.npz",
    f"sparc --data f.npz {FIT} --out sparc",
    f"sae --data f.npz --stream x {FIT} --out sae",
    f"sae --data tok.npz --norm none {FIT} --out tokens",
    "eval tokens --export lens",
    f"sparc --data feats.npz {FIT} --out world",
    f"sparc --data feats.npz --streams clip_img,clip_txt {FIT} --out pair",
    "encode pair --out codes.npz",
    f"finetune --images pics {SMALL_TUNE.replace('vit_micro', 'v=vit_micro:random')} --out tuned",
    "tile --images slide.png --size 16 --smallest 0.001 --out tiles",
]
# Command lines that work, of which each input damages one; "o" is where they write.
CASES = [case.split() for case in [
    f"sparc --data f.npz --taxonomy taxonomy.json {FIT} --out o",
    f"sparc --data folder --streams x,y {FIT} --norm standard --out o",
    "sparc --data f.npz --resume --out sparc",
    f"sae --data f.npz --stream y --activation relu {FIT} --out o",
    "sae --data tok.npz --resume --out tokens",
    f"sae --activation all --data f.npz --stream x {FIT} --out o",
    "add pair --stream vit --batch 16 --epochs 1 --out o",
    "add codes.npz --data feats.npz --stream vit --batch 16 --epochs 1 --out o",
    "eval sparc --json o.json",
    "eval sparc --data folder --json o.json",
    "eval tokens --export o",
    "encode lens/x --data tok.npz --out o.npz",
    "latents lens/x/sae_weights.safetensors --data tok.npz --out o",
    "encode sparc --data f.npz --out o.npz",
    "encode tokens --mode joint --out o.npz",
    f"ablate --data f.npz --no-null {FIT} --out o",
    f"sweep --data f.npz --over k=2,4 {FIT} --out o",
    f"sweep --data f.npz --over streams=x+y {FIT} --out o",
    "latents tokens --between well,sick --out o",
    "latents sae --data f.npz --top 3",
    "latents tokens --sample 1 --token 2 --out o",
    "latents sae,sparc --stream x --out o",
    "intervene tokens --label sick --out o",
    "intervene tokens --label 1 --other tok.npz --out o",
    "intervene tokens --out o",
    "latents tokens --top 2 --prompts o.json",
    "latents tokens --names names.json --query nucleus --label sick",
    "compare sae tokens --data f.npz --streams x,x --json o.json",
    "compare sae sae --json o.json",
    "tissue --pictures 8 --size 16 --out o",
    f"clip --images tissue/tissue.npz {SMALL_CLIP} --out o",
    f"clip --images tissue/tissue.npz {SMALL_CLIP} --merges merges.txt --out o",
    f"explain world --images tissue/tissue.npz {WEIGHTS} --least 1 --most 2 --out o",
    f"explain world --images tissue/tissue.npz {WEIGHTS} --most 2 --query mucin,lymphocyte --out o",
    "retrieve world --sample 1 --from vit --to clip_txt --out o.html",
    "retrieve world --sample 1 --from vit,clip_img --to vit,clip_txt --out o",
    "retrieve world --query mucin --encoder clip --from clip_txt --to clip_img --out o.html",
    "retrieve world --features feats.npz --from clip_img --to vit --out o.html",
    f"dino --images pics {SMALL_DINO} --out o",
    f"dino --images pics {SMALL_DINO} --resume --out dino",
    "extract --images pics --weights d=dino --out o.npz",
    f"extract --images tissue/tissue.npz {WEIGHTS},lsa=lsa:2 --size 16 --out o.npz",
    "extract --images voc --weights d=dino --tokens --out o.npz",
    "extract --images pics --weights d=dino --tokens --out o",
    "extract --images busi --weights d=dino --out o",
    "extract --images coco --weights d=dino,v=vit_micro@4@8:random --out o",
    "extract --images tiles/slide.npz --weights d=dino --balanced --out o",
    f"explain world --images coco {WEIGHTS} --least 1 --most 2 --out o",
    "extract --images tiles/slide.npz --weights v=tuned/v.pt --size 16 --out o.npz",
    "probe --data f.npz --json o.json",
    "probe --data feats.npz --seed 3 --only lymphocyte",
    "tile --voc voc --size 8 --out o",
    "tile --images slide.png --size 16 --smallest 0.001 --rois rois.xml --out o",
    "tile --images slide.png --size 16 --smallest 0.001 --rois rois --out o",
    "tile --images slide.png --size 16 --smallest 0.001 --out o",
    f"mil --data bags.npz {SMALL_MIL} --out o",
    f"mil --data bags {SMALL_MIL} --lr 0.01 --out o",
    f"finetune --images pics {SMALL_TUNE} --out o",
    f"finetune --images med.npz {SMALL_TUNE.replace('vit_micro', 'vit_micro@8')} --split given --out o",
    f"finetune --images tissue/tissue.npz --label mucin {SMALL_TUNE} --out o",
    "explain --images pics --weights d=dino,t=tuned/v.pt --most 1 --size 16 --out o",
    "demo --quick --seed 3 --seeds 2 --out o",
    "bench sparc --json o.json",
]]
COMMANDS = sorted({case[0] for case in CASES})
# Files that a command reads though its command line does not name them.
BEHIND = {"sparc": ["f.npz"], "sae": ["f.npz"], "tokens": ["tok.npz"], "world": ["feats.npz"],
          "pair": ["feats.npz"],
          "tissue/tissue.npz": ["tissue/images/00001.png"], "tiles/slide.npz": ["slide.png"]}


# -- valid inputs ----------------------------------------------------------------------------------

def make_zoo(folder):
    """All inputs of CASES, in `folder`."""
    os.chdir(folder)
    rng, n = np.random.default_rng(0), np.arange(40)
    for path in ("folder", "rois", "busi/benign", "busi/normal", "voc/Annotations",
                 "coco/annotations", "coco/val",
                 "voc/ImageSets/Main", "voc/JPEGImages", "bags/a", "bags/b",
                 *(f"pics/{part}/{name}" for part in ("train", "test") for name in "ab")):
        os.makedirs(path)
    features = {
        "x": rng.random((40, 6), np.float32), "y": rng.random((40, 5), np.float32),
        "labels": rng.random((40, 3)) < 0.5, "label_names": np.array(list("abc")), "groups": n // 2,
        "captions": np.array([f"cell {i % 3}" for i in n]), "ids": np.array([f"id{i}" for i in n]),
        "split": np.where(n < 25, "train", "test")}
    np.savez("f.npz", **features)
    for key in ("x", "y", "labels", "split"):
        np.save(f"folder/{key}.npy", features[key])
    sick = n[n % 2 > 0]
    half = np.full(20, .5)
    np.savez("tok.npz", x=rng.random((40, 4, 6), np.float32), labels=n % 2, grid=np.array([2, 2]),
             label_names=np.array(["well", "sick"]), split=features["split"], groups=n,
             images=np.array(["pics/train/a/0.png"] * 40),
             boxes=np.stack([sick, 2 * half, 0 * half, 0 * half, half, half], 1))
    np.savez("bags.npz", X=rng.random((72, 4)), offsets=3 * n[:25], y=n[:24] % 2,
             folds=n[None, None, :24] % 3 > 0)
    for i in range(24):
        np.savez(f"bags/{'ab'[i % 2]}/{i}.npz", x=rng.random((3, 4), np.float32))
    for path, text in texts():
        Path(path).write_text(text)
    make_pictures(rng)
    for line in MAKE:
        repsae.main(line.split())


def texts():
    """(path, content) of the JSON, XML and text files."""
    parents = {"all": None, "thing": "all", **dict.fromkeys("abc", "thing")}
    box = "<xmin>4</xmin><ymin>4</ymin><xmax>20</xmax><ymax>24</ymax>"
    corners = "".join(f'<Coordinate Order="{i}" X="{60 * (0 < i < 3)}" Y="{90 * (i > 1)}"/>'
                      for i in range(4))
    return [
        ("taxonomy.json", json.dumps(parents)), ("merges.txt", "#version\na b\nc d</w>\n"),
        ("names.json", json.dumps({str(i): f"nucleus {i}" for i in range(12)})),
        ("coco/annotations/instances_val.json", json.dumps({
            "images": [{"id": i, "file_name": f"{i}.png", "width": 16, "height": 16}
                       for i in range(8)], "categories": [{"id": 3, "name": "a"}],
            "annotations": [{"image_id": i, "category_id": 3, "bbox": [2, 2, 9, 9], "segmentation":
                             [[[2, 2, 11, 2, 11, 11]], {"counts": [256], "size": [16, 16]},
                              {"counts": [9, 20, 227], "size": [16, 16]}][i % 3]}
                            for i in range(8)]})),
        ("coco/annotations/captions_val.json", json.dumps({
            "annotations": [{"image_id": i, "caption": f"a {i}"} for i in range(8)]})),
        ("voc/ImageSets/Main/trainval.txt", "0\n1\n"), ("voc/ImageSets/Main/test.txt", "2\n3\n"),
        *((name, f'<A><Annotation PartOfGroup="_0">{corners}</Annotation></A>')
          for name in ("rois.xml", "rois/slide.xml")),
        *((f"voc/Annotations/{i}.xml", f'<?xml version="1.0" encoding="utf-8"?><a><object>'
           f"<name>n{i % 2}</name><bndbox>{box}</bndbox></object></a>") for i in range(4))]


def make_pictures(rng):
    """Class folders, those of Pascal VOC, a MedMNIST file and a slide."""
    sides = {f"voc/JPEGImages/{i}.jpg": 32 for i in range(4)}
    sides.update({f"coco/val/{i}.png": 16 for i in range(8)})
    sides.update({f"pics/{split}/{name}/{i}.png": 16 for split, n in (("train", 6), ("test", 3))
                  for name in "ab" for i in range(n)})
    for path, side in sides.items():
        Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(path)
    for name in ("benign/1.png", "benign/1_mask.png", "normal/2.png", "normal/2_mask.png"):
        Image.fromarray(np.uint8(255 * np.eye(16)) * ("normal" not in name)).save(f"busi/{name}")
    images, labels = rng.integers(0, 255, (8, 8, 8, 3), np.uint8), np.arange(8)[:, None] % 2
    np.savez("med.npz", **{f"{s}_images": images for s in data.SPLITS},
             **{f"{s}_labels": labels for s in data.SPLITS})
    slide = np.full((96, 128, 3), 245, np.uint8)
    slide[8:88, 8:120] = np.array([220, 150, 180]) + rng.integers(-8, 8, (80, 112, 3))
    Image.fromarray(slide).save("slide.png")


# -- damage ----------------------------------------------------------------------------------------

# No absolute path but where nobody can write: the commands do write where they are told to.
TEXTS = ["", " ", "nan", "inf", "-inf", "-1", "0", "0.5", "1e400", str(10 ** 12), str(2 ** 64), "x",
         "a\nb", "a\0b", "\udcff", "y" * 5000, "../x", ".", "/proc/x", ",", "=", ":", "a=b", "lr=",
         "x=dino:", "lr=x", "k=0", "\u00b2", "\u0661", "None", "--", "-", "1,2", "\x1b[1m", "f.npz",
         "pics", "sparc", "fifo", "slide.png", "taxonomy.json", "loop"]


def damage_flags(argv, rng):
    """A command line with one or two words of it replaced, doubled, left out or added."""
    argv = list(argv)
    for _ in range(rng.choice([1, 1, 1, 2])):
        at, how = rng.randrange(1, len(argv) + 1), rng.random()
        if how < 0.4:
            name, text = rng.choice(flags_of(argv[0])), rng.choice(TEXTS)
            argv[at:at] = ["--set", f"{name}={text}"] if name in repsae.SETTINGS \
                else [f"--{name}", text]
        elif how < 0.8:
            argv[at:at + 1] = [rng.choice(TEXTS)]
        elif how < 0.9:
            del argv[at:at + 1]
        else:
            argv[at:at] = argv[at:at + 2]
    return argv


def flags_of(command):
    """The names of a command's flags and settings."""
    return sorted(repsae.COMMANDS[command].flags)


def files_used(argv):
    """Every file that a command line names, by itself, by its folder or behind it."""
    words = [w for word in argv for w in re.split("[=,:]", word) if w and os.path.exists(w)]
    words += [path for word in words for path in BEHIND.get(word, ())]
    inside = [f"{where}/{f}" for word in words for where, _, files in os.walk(word) for f in files]
    return sorted({*inside, *filter(os.path.isfile, words)})


def damage_file(path, rng):
    """Replace a file by a damaged one; returns what was done."""
    kinds = {".npz": damage_npz, ".npy": damage_npy, ".json": damage_json, ".pt": damage_pt,
             **dict.fromkeys((".csv", ".txt", ".xml"), damage_text),
             **dict.fromkeys((".png", ".jpg"), damage_picture)}
    own = kinds.get(os.path.splitext(path)[1], damage_bytes)
    how = rng.choice([damage_bytes, damage_place, own, own, own, own])
    return how.__name__, path, how(path, rng)


def damage_bytes(path, rng):
    raw = bytearray(Path(path).read_bytes())
    at, n = rng.randrange(len(raw) + 1), rng.choice([1, 4, 64, 1000])
    how = rng.choice(["truncate", "flip", "zero", "insert", "empty"])
    if how == "flip":
        for i in range(min(n, len(raw))):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif how == "zero":
        raw[at:at + n] = bytes(len(raw[at:at + n]))
    else:
        more = raw[:at] + rng.randbytes(n) + raw[at:]
        raw = {"truncate": raw[:at], "insert": more, "empty": b""}[how]
    Path(path).write_bytes(raw)
    return how


def damage_place(path, rng):
    """Something else where a file belongs."""
    other = rng.choice(["f.npz", "slide.png", "taxonomy.json", "sparc/checkpoint.pt"])
    other = Path(other).read_bytes()
    os.remove(path)
    how = rng.choice(["missing", "folder", "fifo", "loop", "null", "other"])
    if how == "folder":
        os.mkdir(path)
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "other":
        Path(path).write_bytes(other)
    elif how != "missing":
        os.symlink({"loop": os.path.basename(path), "null": "/dev/null"}[how], path)
    return how


def odd_array(x, rng):
    """An array that is not quite what x was."""
    x = np.array(x)
    kinds = ("?", "u1", "f2", "f8", ">f4", "g", "F", "M8[s]", "V3")
    made = {"0-d": x.ravel()[:1].reshape(() if x.size else 0), "empty": x[:0] if x.ndim else x,
            "flat": x.ravel(), "deeper": x[..., None], "shorter": x[1:] if x.ndim else x,
            "object": np.array([{}, 1], object), "text": np.full(x.shape, "a\nb\ud800"),
            "bytes": np.full(x.shape, b"\xff"), "spoiled": spoiled_array(x, rng),
            "int": np.full(x.shape, rng.choice([-1, 0, 1, 10 ** 8, 2 ** 62])),
            **{kind: np.ones(x.shape).astype(kind) for kind in kinds}}
    return made[rng.choice(sorted(made))]


def spoiled_array(x, rng):
    out = x.copy().ravel()
    if out.size and out.dtype.kind in "fiub":
        with np.errstate(invalid="ignore"):                  # a value that does not fit wraps round
            value = rng.choice([np.nan, np.inf, 1e30, -1e30, -1, 0, 1e8, 3e9])
            out[rng.randrange(out.size):] = np.array(value).astype(out.dtype)
    return out.reshape(x.shape)


def npy_bytes(x, rng=None):
    """The bytes of an .npy; with `rng` of an odd array, or under an odd header."""
    out, header = io.BytesIO(), rng and rng.random() < 0.3
    np.save(out, odd_array(x, rng) if rng and not header else x, allow_pickle=True)
    if not header:
        return out.getvalue()
    shape = rng.choice(["(1000000000000, 4)", "(-1,)", "(2,)", "()", "3", "None", "(" * 900])
    kind, version = rng.choice(["<f4", "|O", "<U7", "x", "<f99"]), rng.choice([1, 1, 1, 2, 3, 9])
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return out.getvalue()[:6] + bytes([version, 0]) + size + text + out.getvalue()[128:]


def damage_npy(path, rng):
    Path(path).write_bytes(npy_bytes(np.load(path), rng))


def damage_npz(path, rng):
    """One array of the file, or the way that it is packed."""
    with np.load(path) as z:
        members = {f"{k}.npy": npy_bytes(v) for k, v in z.items()}
        key = rng.choice(sorted(z))
        how = rng.choice(["array"] * 8 + ["drop", "rename", "foreign", "packing", "reserved"])
        if how == "array":
            members[f"{key}.npy"] = npy_bytes(z[key], rng)
    if how in ("drop", "rename"):
        content = members.pop(f"{key}.npy")
        name = rng.choice([f"{key}2.npy", "a\nb.npy", "<b>.npy", "k" * 500 + ".npy"])
        members.update({name: content} if how == "rename" else {})
    if how == "reserved":
        name = rng.choice([*data.RESERVED, "training", "_parameters", "a.b", "x"])
        members[f"{name}.npy"] = members[f"{key}.npy"]
    if how == "foreign":
        members[rng.choice(["readme.txt", "x", "../x.npy", "\u00e9.npy", ".npy"])] = b"hello"
    with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])) as z:
        for name, content in members.items():
            z.writestr(name, content)
    if how == "packing":                                     # of another method, or encrypted
        raw = bytearray(Path(path).read_bytes())
        offset, value = rng.choice([(10, 9), (10, 97), (10, 12), (8, 1), (24, 255)])
        raw[raw.rindex(b"PK\1\2") + offset] = value
        Path(path).write_bytes(raw)
    return key, how


def spoil(tree, rng, values):
    """(path to a node, the tree of dicts and lists with that node replaced, left out or added)."""
    if isinstance(tree, (dict, list)) and tree and rng.random() < 0.8:
        tree = tree.copy()
        key = rng.choice(sorted(tree, key=str) if isinstance(tree, dict) else range(len(tree)))
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
    where, tree = "whole", json.loads(Path(path).read_text())
    n = 300
    nest = '{"LabelName": "a", "Subcategory": [' * n + '{"LabelName": 3}' + "]}" * n
    chain = {"n0": None, **{f"n{i + 1}": f"n{i}" for i in range(20000)}}
    texts = ["{}", "[]", "null", "3", '"x"', "NaN", "{", "", "[" * 30000 + "]" * 30000, "\ufeff{}",
             '{"a": "b", "b": "a"}', '{"a": ' * 3000 + "1" + "}" * 3000, json.dumps(chain), nest]
    odd = [{}, [], None, True, 0, -1, 1.5, 10 ** 12, float("nan"), "", "x", "a\nb", "\ud800", [[1]],
           {"a": 1}, "y" * 3000, 2 ** 70]
    text = rng.choice(texts)
    if rng.random() > 0.15:
        where, tree = spoil(tree, rng, odd)
        text = json.dumps(tree)
    Path(path).write_text(text, errors="replace")
    return where


def damage_text(path, rng):
    """Lines of a CSV file, a list or an XML file."""
    text = Path(path).read_text()
    words = re.findall(r"[\w.]+", text)
    old = rng.choice(words or [""])
    new = rng.choice(["", "nan", "x", "-1", "1e400", "../../../evil", "\0", "a b", "\u00e9", "<",
                      '"', "utf-16", "klingon", "utf-7", "9" * 400, "&a;", "\n"])
    more = rng.choice(["", "", "", "\n\n", "x", ",,,\n1"])
    text = text.replace(old, new, rng.choice([1, -1])) + more
    Path(path).write_bytes(text.encode() + rng.choice([b"", b"", b"\xff"]))
    return old, new


def damage_pt(path, rng):
    def tensor(change):
        return lambda v: change(v) if isinstance(v, torch.Tensor) else True
    plain = [None, "x", {}, [], -1, 0, 10 ** 12, 0.5, torch.zeros(3, 0), torch.ones(2, 2).char()]
    where, tree = spoil(torch.load(path, weights_only=True), rng, [
        *(lambda v, w=w: w for w in plain), tensor(lambda v: v.double()),
        tensor(lambda v: v * float("nan")), tensor(lambda v: v.reshape(-1)[:1])])
    torch.save(tree, path)
    return where


def damage_picture(path, rng):
    how = rng.choice(["mode", "huge", "small", "cut", "text", "gif"])
    image = Image.open(path).convert("RGB")
    if how == "mode":
        how = rng.choice(["1", "L", "P", "CMYK", "RGBA", "LA", "I", "I;16", "F", "YCbCr"])
        image = image.convert("I" if how == "I;16" else "RGB").convert(how)
        image.save(path, "PNG" if how in ("1", "L", "P", "RGBA", "LA") else "TIFF")
    elif how == "huge":                                      # declares what it does not hold
        image.save(path, "PNG")
        raw = bytearray(Path(path).read_bytes())
        size = rng.choice([(9000, 9000), (10 ** 6, 10 ** 6), (0, 5), (2 ** 31 - 1, 1)])
        raw[16:24] = struct.pack(">II", *size)
        raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
        Path(path).write_bytes(raw)
    elif how == "small":
        image.resize((1, rng.choice([1, 3]))).save(path)
    elif how == "cut":
        raw = Path(path).read_bytes()
        Path(path).write_bytes(raw[:rng.randrange(8, len(raw))])
    else:
        image.save(path, "GIF") if how == "gif" else Path(path).write_text("hello")
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
    """Run an input, in a process of its own, in the copy `place`/zoo; it speaks to `place`/err."""
    shutil.copytree(zoo, f"{place}/zoo", symlinks=True)
    os.chdir(f"{place}/zoo")
    before = {path: os.stat(path) for path in outputs()}
    argv, damage = prepare(number, seed)
    Path(f"{place}/told").write_text(f"{argv}\n{damage}", errors="replace")
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{place}/{name}", os.O_CREAT | os.O_WRONLY), stream.fileno())
    size = int(re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + GIGABYTES * 2 ** 30,) * 2)
    # of `bench` and `demo` only what they do with their flags counts
    repsae.in_tests("bench").run = repsae.in_tests("thesis").demo = lambda *_: {}
    signal.alarm(SECONDS)                                    # kills, whatever is running then
    asking = threading.Timer(PATIENCE, os.kill, (os.getpid(), signal.SIGINT))
    asking.daemon = True
    asking.start()
    code = 0
    try:
        repsae.main(argv)
    except SystemExit as e:
        code = e.code or 0
    except BaseException as e:
        traceback.print_exc()
        frames = [f for f in traceback.extract_tb(e.__traceback__) if str(ROOT) in f.filename]
        at = ":".join(f"{Path(f.filename).name}:{f.lineno}:{f.name}" for f in frames[-1:])
        at = f"{at}: {type(e).__name__}: {str(e)[:90]!r}"
        Path(f"{place}/at").write_text(at, errors="replace")
        code = 1
    signal.alarm(0)
    broken = [path for path in outputs() if path not in before and not whole(path)]
    Path(f"{place}/broken").write_text("\n".join(broken), errors="replace")
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
            return json.loads(Path(path).read_text()) is not None
        return not path.endswith(".tmp") and torch.load(path, weights_only=True) is not None
    except Exception:                                        # whatever it is: nobody can read it
        return False


def verdict(status, usage, place):
    """(column of the table, where or what) of a process that has ended."""
    read = {name: told(place, name) for name in ("err", "at", "broken")}
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ("hang", "") if number == signal.SIGALRM else ("traceback", f"signal {number}")
    memory = re.search("MemoryError|can't allocate memory|Unable to allocate", read["err"])
    if memory or usage.ru_maxrss > GIGABYTES * 2 ** 20:
        return "over 4 GB", read["at"]
    if read["at"]:
        return "traceback", read["at"]
    if read["broken"]:
        return "half-written", read["broken"]
    trained = re.search(r"^(step \d+/|before training)", read["err"], re.M)
    if os.WEXITSTATUS(status) == 0 or os.WEXITSTATUS(status) == 130 and trained:
        return "ran", ""                                     # or stopped when it was asked to
    if os.WEXITSTATUS(status) == 130:
        return "hang", "before training"
    lines = read["err"].splitlines()
    errors = [line for line in lines if line.startswith("repsae: error: ")]
    fine = os.WEXITSTATUS(status) == 2 and lines[-1:] == errors and len(errors[0]) <= 400
    return ("refused", "") if fine else ("bad message", "\n".join(lines[-3:])[:300])


def told(place, name):
    path = Path(f"{place}/{name}")
    return path.read_text(errors="replace") if path.exists() else ""


def run_inputs(numbers, seed, zoo, jobs, until, show):
    """Run inputs, `jobs` at once, up to the time `until`; show(number, column, what, place)."""
    running, numbers = {}, list(numbers)[::-1]
    while True:
        while len(running) < jobs and time.time() < until and numbers:
            number = numbers.pop()
            place = tempfile.mkdtemp(dir=os.path.dirname(zoo))
            if not (pid := os.fork()):
                try:
                    child(number, seed, zoo, place)
                except BaseException:                        # a fault of this file
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
    parser = argparse.ArgumentParser(description=__doc__)
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
            print(*(told(place, name) for name in ("told", "out", "err")), column, what, sep="\n")
    numbers = range(args.inputs) if args.repeat is None else [args.repeat]
    numbers = [n for n in numbers if args.only in (None, command_of(n))]
    fast = "/dev/shm" if os.path.isdir("/dev/shm") else None                                # memory
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        zoo = os.path.join(folder, "zoo")
        os.mkdir(zoo)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_zoo(zoo)
        run_inputs(numbers, args.seed, zoo, args.jobs, began + args.seconds, show)
        os.chdir(ROOT)
    print(f"{'':12}" + "".join(f"{name:>13}" for name in COLUMNS))
    table["~ all"] = sum(table.values(), collections.Counter())
    for command, row in sorted(table.items()):
        print(f"{command:12}" + "".join(f"{row[name]:13}" for name in COLUMNS))
    for (column, what), found in sorted(places.items(), key=lambda item: -len(item[1])):
        print(f"{len(found)} x {column}: {what} (inputs {', '.join(map(str, found[:5]))})")
    print(f"{time.time() - began:.0f} s")
    raise SystemExit(bool(places))


if __name__ == "__main__":
    main()
