"""Claims about the command line: what a run leaves, that it repeats and resumes to the byte, and every user error."""
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import eval as judge
import repsae
import sae
from conftest import ROOT

SMALL = ["--latents", "40", "--k", "4", "--batch", "64", "--lr", "3e-3", "--epochs", "3"]


def run(*argv):
    repsae.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A small file of planted streams with a split, captions, and the kingdoms of their concepts as labels."""
    import data
    made = data.planted_streams(1000, {"x": 16, "y": 12})
    kingdoms = made.labels.reshape(1000, 4, 12).any(2)
    path = tmp_path_factory.mktemp("data") / "f.npz"
    np.savez(path, **made.streams, labels=kingdoms, label_names=np.array(list("ABCD")), split=made.split,
             captions=np.array([f"<b>sample {i}" for i in range(1000)]))
    return path


@pytest.fixture(scope="module")
def finished(features, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "r"
    run("sparc", "--data", features, *SMALL, "--epochs", 12, "--null", "--out", out)
    return out


# -- what a run leaves -------------------------------------------------------------------------------------------------

def test_a_run_leaves_its_five_files_and_nothing_half_written(finished):
    assert sorted(os.listdir(finished)) == ["checkpoint.pt", "config.json", "log.csv", "metrics.json", "null",
                                            "report.html"]
    config = json.loads((finished / "config.json").read_text())
    assert config["flags"]["latents"] == 40 and config["flags"]["dead_after"] == 1000
    assert config["dims"] == {"x": 16, "y": 12}
    assert config["data_hash"] and config["versions"]["torch"]
    rows = list(csv.DictReader(open(finished / "log.csv")))
    assert rows[-1]["step"] == "156" and float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_every_cross_stream_number_comes_joint_alone_and_with_its_null(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    for block in (metrics["joint"], metrics["alone"], metrics["null"]["joint"], metrics["null"]["alone"]):
        assert {"activation", "r2", "nmse", "retrieval", "concepts", "probe"} <= set(block)
        assert set(block["retrieval"]) == {"x -> y", "y -> x"} and set(block["r2"]["x"]) == {"x", "y"}
    assert set(metrics["ceiling"]["x"]) == {"y"}


def test_the_report_is_one_file_without_links_or_scripts_and_with_its_strings_escaped(finished):
    page = (finished / "report.html").read_text()
    assert not re.search(r"<(script|link)|src=\"(?!data:)|https?://(?!www\.w3)", page)
    assert "&lt;b&gt;sample" in page and "<b>sample" not in page


def test_the_null_finds_no_pairs_alone_but_nearly_all_of_them_jointly(tmp_path, capsys):
    run("sparc", "--epochs", 15, "--out", tmp_path / "r")
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())

    def r1(block):
        return np.mean([v["R@1"] for v in block["retrieval"].values()])
    assert r1(metrics["null"]["joint"]) > 0.5 and r1(metrics["null"]["alone"]) < 0.02 < 0.4 < r1(metrics["alone"])
    assert "null alone" in capsys.readouterr().out


def test_eval_repeats_the_metrics_of_the_run(finished, tmp_path):
    run("eval", finished, "--json", tmp_path / "m.json")
    again, first = (json.loads(p.read_text()) for p in (tmp_path / "m.json", finished / "metrics.json"))
    assert again == {k: v for k, v in first.items() if k != "null"}


@pytest.mark.parametrize("mode", ["joint", "alone"])
def test_encode_writes_the_sparse_codes_of_the_model(mode, finished, features, tmp_path):
    run("encode", finished, "--data", features, "--mode", mode, "--out", tmp_path / "c.npz")
    z, raw = np.load(tmp_path / "c.npz"), np.load(features)
    codes = sae.load(finished / "checkpoint.pt")[0].encode({s: torch.tensor(raw[s]) for s in "xy"}, mode)
    for s in "xy":
        assert z[f"{s}_indices"].shape == z[f"{s}_values"].shape == (1000, 4) and z["n_latents"] == 40
        found = sae.Codes(torch.tensor(z[f"{s}_indices"]).long(), torch.tensor(z[f"{s}_values"])).dense(40)
        torch.testing.assert_close(found, codes[s].dense(40).detach(), rtol=1e-5, atol=1e-6)


def test_encode_takes_a_file_with_one_of_the_streams(finished, features, tmp_path):
    np.savez(tmp_path / "one.npz", y=np.load(features)["y"])
    run("encode", finished, "--data", tmp_path / "one.npz", "--out", tmp_path / "c.npz")
    assert "y_indices" in np.load(tmp_path / "c.npz") and "x_indices" not in np.load(tmp_path / "c.npz")


def test_sae_on_one_stream_has_no_cross_stream_numbers(features, tmp_path):
    run("sae", "--data", features, "--stream", "y", *SMALL, "--out", tmp_path / "r")
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert "joint" not in metrics and "retrieval" not in metrics["alone"] and list(metrics["alone"]["r2"]) == ["y"]


def test_ablate_trains_six_configurations_each_with_its_null(features, tmp_path, capsys):
    run("ablate", "--data", features, *SMALL, "--epochs", 1, "--out", tmp_path / "r")
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert list(metrics) == ["global_lam1", "global_lam0", "local_lam1", "local_lam0", "both_lam1", "random_lam1"]
    assert all("null" in m for m in metrics.values()) and capsys.readouterr().out.count("its null") == 6
    configs = [json.loads((tmp_path / "r" / name / "config.json").read_text())["flags"] for name in metrics]
    assert [(c["topk"], c["lam"]) for c in configs] == list(repsae.ABLATION)
    run("ablate", "--data", features, *SMALL, "--epochs", 1, "--no-null", "--out", tmp_path / "r", "--overwrite")
    assert "null" not in json.loads((tmp_path / "r" / "metrics.json").read_text())["both_lam1"]


@pytest.mark.parametrize("over", ["k=2,4", "lam=0.5,1", "latents=20,30", "lr=1e-3,1e-2"])
def test_sweep_gives_a_table_and_a_chart(over, features, tmp_path, capsys):
    run("sweep", "--data", features, *SMALL, "--epochs", 1, "--over", over, "--out", tmp_path / "r")
    found = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert len(found["rows"]) == 2 and all(isinstance(v, float) for row in found["rows"] for v in row[1:])
    import xml.etree.ElementTree as ET
    assert len(ET.parse(tmp_path / "r" / "sweep.svg").getroot().findall(".//{*}polyline")) == 6


# -- repeating and resuming --------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_bytes_and_another_does_not(features, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("sparc", "--data", features, *SMALL, "--seed", seed, "--out", tmp_path / name)
    a, b, c = ((tmp_path / name / "metrics.json").read_bytes() for name in "abc")
    assert a == b != c


LONG = ["--latents", "300", "--k", "4", "--batch", "16", "--epochs", "15", "--topk", "both", "--dead-after", "40",
        "--reinit-after", "20", "--save-every", "0.05", "--log-every", "7"]


def start(features, out, *more):
    command = [sys.executable, ROOT / "repsae.py", "sparc", "--data", features, *LONG, "--out", out, *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def uninterrupted(features, tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "r"
    assert start(features, out).communicate() and (out / "metrics.json").exists()
    return out


def assert_same_run(a, b):
    for name in ("log.csv", "metrics.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    states = [torch.load(p / "checkpoint.pt", weights_only=True) for p in (a, b)]
    flat = [{**s["model"], **{f"{i}{k}": v for i, m in s["optimiser"]["state"].items() for k, v in m.items()}}
            for s in states]
    assert flat[0].keys() == flat[1].keys() and all(torch.equal(v, flat[1][k]) for k, v in flat[0].items())


def test_a_run_killed_at_random_moments_resumes_to_the_same_bytes(features, uninterrupted, tmp_path):
    draw = random.Random(0)
    out = tmp_path / "r"
    killed = 0
    for _ in range(4):
        child = start(features, out, "--resume")
        deadline = time.time() + 60
        before = (out / "checkpoint.pt").stat().st_mtime_ns if (out / "checkpoint.pt").exists() else 0
        while child.poll() is None and time.time() < deadline:       # let it come past its last checkpoint, then strike
            if (out / "checkpoint.pt").exists() and (out / "checkpoint.pt").stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(draw.random() * 0.3)
        killed += child.poll() is None
        child.kill()
        child.communicate()
    assert killed >= 2
    child = start(features, out, "--resume")
    child.communicate()
    assert child.returncode == 0
    assert_same_run(out, uninterrupted)


def test_ctrl_c_saves_and_says_how_to_go_on(features, uninterrupted, tmp_path):
    out = tmp_path / "r"
    child = start(features, out)
    while not (out / "checkpoint.pt").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert child.returncode == 130 and "Traceback" not in err
    assert re.search(rf"stopped at step \d+ of 750; go on with: python repsae.py sparc --resume --out {out}", err)
    run("sparc", "--resume", "--out", out)                   # the run knows its own settings
    assert_same_run(out, uninterrupted)


# -- errors ------------------------------------------------------------------------------------------------------------

def error(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    err = capsys.readouterr().err.strip().split("\n")[-1]
    assert caught.value.code == 2 and err.startswith("repsae: error: ") and " - " in err
    return err


def test_impossible_flags_end_in_one_line_before_anything_is_written(features, tmp_path, capsys):
    out = tmp_path / "r"
    for argv, message in ((["--k", 41], "k=41 must lie in 1..latents=40 - lower k or raise latents"),
                          (["--epochs", 0], "--epochs 0 - give at least 1"),
                          (["--lr", 0], "--lr 0.0 - give a positive number"),
                          (["--k", "x"], "argument --k: invalid int value: 'x'"),
                          (["--topk", "all"], "argument --topk: invalid choice: 'all'"),
                          (["--bogus"], "unrecognized arguments: --bogus"),
                          (["--streams", "x,q"], "has no stream 'q' - it has x, y"),
                          (["--streams", "x"], "has the one stream x"),
                          (["--lam", "nan"], "--lam nan - give at least 0"),
                          (["--taxonomy", tmp_path / "t.json"], "no taxonomy at"),
                          (["--device", "abacus"], "device 'abacus'")):
        assert message in error(capsys, "sparc", "--data", features, *SMALL, "--out", out, *argv)
    assert "no file or folder" in error(capsys, "sparc", "--data", tmp_path / "none.npz", "--out", out)
    assert "pick one with --stream" in error(capsys, "sae", "--data", features, "--out", out)
    sweep = ("sweep", "--data", features, "--out", out)
    assert "--over None - write for example" in error(capsys, *sweep)
    assert "--over k=a: the values must be of type int" in error(capsys, *sweep, "--over", "k=a")
    assert "k=80 must lie in 1..latents=40" in error(capsys, *sweep, *SMALL, "--over", "k=2,80")
    assert not out.exists()


def test_a_run_folder_is_not_overwritten_unasked(finished, features, tmp_path, capsys):
    refused = error(capsys, "sparc", "--data", features, *SMALL, "--out", finished)
    assert "holds a run already - use --resume, --overwrite or another --out" in refused
    assert "--k 5 differs from the run" in error(capsys, "sparc", "--resume", "--out", finished, "--k", 5)
    (tmp_path / "mine.txt").write_text("keep")
    run("sparc", "--data", features, *SMALL, "--out", tmp_path, "--overwrite")
    assert (tmp_path / "mine.txt").read_text() == "keep" and (tmp_path / "metrics.json").exists()


def test_resuming_on_changed_data_is_refused(features, tmp_path, capsys):
    copy = tmp_path / "f.npz"
    copy.write_bytes(features.read_bytes())
    run("sparc", "--data", copy, *SMALL, "--out", tmp_path / "r")
    z = dict(np.load(features))
    np.savez(copy, **{**z, "x": z["x"] + 1})
    assert "is not what the run in" in error(capsys, "sparc", "--resume", "--out", tmp_path / "r")


def test_an_unwritable_folder_is_refused(features, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is a file - name a folder" in error(capsys, "sparc", "--data", features, *SMALL, "--out", tmp_path / "file")
    assert "cannot write to" in error(capsys, "sparc", "--data", features, *SMALL, "--out", tmp_path / "file" / "r")
    assert "cannot write to" in error(capsys, "sparc", "--data", features, *SMALL, "--out", "/proc/r")


def test_a_run_and_data_that_do_not_fit_are_refused(finished, features, tmp_path, capsys):
    z = dict(np.load(features))
    np.savez(tmp_path / "wide.npz", x=z["x"], y=z["x"])
    np.savez(tmp_path / "less.npz", x=z["x"])
    np.savez(tmp_path / "other.npz", q=z["x"])
    wide = error(capsys, "eval", finished, "--data", tmp_path / "wide.npz")
    assert "the run was trained on {'x': 16, 'y': 12}, the data has {'x': 16, 'y': 16}" in wide
    assert "the data lacks the run's stream 'y'" in error(capsys, "eval", finished, "--data", tmp_path / "less.npz")
    other = error(capsys, "encode", finished, "--data", tmp_path / "other.npz", "--out", tmp_path / "c")
    assert "has q, the run knows x, y - check the keys" in other
    assert "is no run folder" in error(capsys, "eval", tmp_path)
    assert "No such file or directory: " in error(capsys, "eval", finished, "--json", tmp_path / "no" / "m.json")
    assert "No such file or directory: " in error(capsys, "encode", finished, "--out", tmp_path / "no" / "c.npz")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text((finished / "config.json").read_text())
    (tmp_path / "cut" / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes()[:500])
    assert "is not a readable checkpoint" in error(capsys, "eval", tmp_path / "cut")


def test_help_shows_every_default_and_needs_no_torch():
    program = "import sys, repsae\ntry: repsae.main(sys.argv[1:])\nexcept SystemExit: print('torch' in sys.modules)"
    for name, (_, table, _, _) in repsae.COMMANDS.items():
        command = [sys.executable, "-c", program, name, "--help"]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        assert out.strip().endswith("False")
        for flag, (default, _, _) in table.items():
            assert f"--{flag}" in out
        assert out.count("(default:") == len(table)


def test_the_scans_that_bench_compares_compute_the_same():
    ways = repsae.scan_contenders((2, 13, 6, 3), "cpu")
    y = {name: forward() for name, (forward, _) in ways.items()}
    gradients = {name: both() for name, (_, both) in ways.items()}
    oracle = "loop over slices (reference)"
    assert len(ways) >= 4
    for name in ways:
        torch.testing.assert_close(y[name], y[oracle], rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients[name], gradients[oracle]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_what_was_held_at_once():
    """64 MB held twice over one after the other is 64, held together 128; a child has no past to reuse."""
    one, two = judge.in_child(_peaks)
    assert 60 < one < 80 and 120 < two < 144


def _peaks():
    def apart():
        for _ in range(2):
            torch.ones(2 ** 24)
    return judge.peak_of(apart, "cpu"), judge.peak_of(lambda: [torch.ones(2 ** 24) for _ in range(2)], "cpu")


def test_build_says_in_one_line_that_there_is_no_compiler(capsys, monkeypatch):
    import ssm

    def absent(verbose):
        raise OSError("Error compiling: no c++ here\nmore")
    monkeypatch.setattr(ssm, "build_native", absent)
    assert "cannot be built (Error compiling: no c++ here) - it needs ninja" in error(capsys, "build")
    assert "no such folder" in error(capsys, "bench", "scan", "--svg", "/no/such/x.svg")


# -- backbones ---------------------------------------------------------------------------------------------------------

TINY_DINO = ["--arch", "vim_micro", "--size", 16, "--local-size", 8, "--local-crops", 2, "--prototypes", 32, "--head-hidden", 24,
             "--batch", 8, "--epochs", 3, "--warmup", 1, "--blur", 0.2, "--log-every", 1, "--workers", 0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Discs and squares of many sizes and colours, in train and test folders."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    row, column = np.mgrid[:24, :24] - 12
    for split, n in (("train", 12), ("test", 5)):
        for name in ("disc", "square"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                r = rng.integers(4, 10)
                inside = row ** 2 + column ** 2 < r ** 2 if name == "disc" else np.maximum(abs(row), abs(column)) < r * 0.8
                image = np.where(inside[..., None], rng.integers(0, 255, 3), rng.integers(0, 255, 3)).astype(np.uint8)
                Image.fromarray(image).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("dino") / "r"
    run("dino", "--images", pictures, *TINY_DINO, "--out", out)
    return out


def test_a_dino_run_leaves_its_files_curves_and_neighbours(trained):
    assert sorted(os.listdir(trained)) == ["checkpoint.pt", "config.json", "log.csv", "metrics.json", "report.html"]
    with open(trained / "log.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 9 and [bool(r["knn"]) for r in rows] == [False, False, True] * 3        # 24 pictures, 3 steps an epoch
    report = (trained / "report.html").read_text()
    assert report.count("data:image/jpeg") == 80 and "entropy" in report and "<script" not in report
    metrics = json.loads((trained / "metrics.json").read_text())
    assert 0 <= metrics["knn"] <= 1 and 0 <= metrics["knn_pixels"] <= 1


def test_dino_stopped_between_steps_resumes_to_the_same_bytes(trained, pictures, tmp_path, monkeypatch):
    import ssm
    out, true_step, taken = tmp_path / "r", ssm.dino_step, []

    def stopping(*args, **kw):
        taken.append(1)
        if len(taken) == 5:
            signal.raise_signal(signal.SIGINT)
        return true_step(*args, **kw)
    monkeypatch.setattr(ssm, "dino_step", stopping)
    with pytest.raises(SystemExit) as e:
        run("dino", "--images", pictures, *TINY_DINO, "--out", out)
    assert e.value.code == 130 and not (out / "metrics.json").exists()
    run("dino", "--resume", "--out", out)
    assert len(taken) == 9
    assert (out / "log.csv").read_bytes() == (trained / "log.csv").read_bytes()
    ours, whole = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (out, trained))
    for part in ("student", "teacher"):
        assert all(torch.equal(ours[part][k], v) for k, v in whole[part].items())


def test_a_collapsed_run_is_stopped_with_a_clear_line(pictures, tmp_path, capsys, monkeypatch):
    """A teacher whose output is the same for every picture: uniform, and constant."""
    import ssm
    for kind, logits in (("uniform", torch.zeros(1, 32)), ("constant", 9 * torch.eye(32)[:1])):
        monkeypatch.setattr(ssm.DINOHead, "forward", lambda self, x: logits.expand(len(x), -1) + 0 * self.last_layer.weight_v.sum())
        monkeypatch.setattr(ssm, "move_center", lambda center, teacher: None)
        line = error(capsys, "dino", "--images", pictures, *TINY_DINO, "--out", tmp_path / kind)
        assert f"collapse: the teacher's output was {kind} for every picture all through epoch 1" in line


def test_extracted_streams_are_the_backbones_features_and_feed_probe_and_sparc(trained, pictures, tmp_path, capsys):
    import data
    import ssm
    out = tmp_path / "f.npz"
    run("extract", "--images", pictures, "--weights", f"vim={trained},random=vit_micro:random", "--last", 2, "--size", 32, "--out", out)
    z = np.load(out)
    assert z["vim"].shape == (34, 96) and z["random"].shape == (34, 192)
    assert list(z["label_names"]) == ["disc", "square"] and (z["split"] == "train").sum() == 24
    model = ssm.load_weights(ssm.vim_micro(size=16), trained / "checkpoint.pt").eval()
    x = data.plain_view(32)(data.open_image(tmp_path / z["images"][7]))[None]
    torch.testing.assert_close(torch.from_numpy(z["vim"][7]), model.features(x)[0].detach(), rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    run("probe", "--data", out, "--json", tmp_path / "p.json")
    table, found = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert "vim, linear" in table and "random, 200-NN" in table and "24 samples to learn from, 10 to test on" in table
    assert set(found["vim"]["linear"]) == {"accuracy", "balanced accuracy", "F1", "AUC"}
    run("sparc", "--data", out, "--latents", 20, "--k", 2, "--batch", 8, "--epochs", 2, "--out", tmp_path / "r")
    run("extract", "--images", pictures, "--weights", f"vim={trained}", "--tokens", "--out", tmp_path / "t.npz")
    assert np.load(tmp_path / "t.npz")["vim"].shape == (34, 4, 96)


@pytest.mark.parametrize("argv, message", [
    (["dino"], "--images is missing"), (["dino", "--images", "/no/such"], "no folder /no/such"),
    (["dino", "--images", "{p}", "--arch", "vgg"], "--arch vgg - take one of vit_tiny"),
    (["dino", "--images", "{p}", "--global-scale", "1,0.4"], "--global-scale 1,0.4 - give two shares"),
    (["dino", "--images", "{p}", "--size", "30"], "images are 30x30"),
    (["extract", "--images", "{p}"], "--weights is missing"),
    (["extract", "--images", "{p}", "--weights", "a"], "--weights a - write name=RUN"),
    (["extract", "--images", "{p}", "--weights", "a=/no"], "/no is no dino run"),
    (["extract", "--images", "{p}", "--weights", "a=vit_micro:/no/w.pth"], "no weights at /no/w.pth"),
    (["probe", "--data", "{f}"], "has no integer labels")])
def test_bad_backbone_input_is_one_line(pictures, features, tmp_path, capsys, argv, message):
    argv = [a.format(p=pictures, f=features) for a in argv]
    if argv[0] != "probe":
        argv += ["--out", tmp_path / "o"]
    assert message in error(capsys, *argv)
    assert not (tmp_path / "o").exists()
