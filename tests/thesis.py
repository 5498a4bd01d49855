"""All of it on made-up tissue: what `python repsae.py demo` runs, and what it asks of the results.

Four tables are the experiment; below them stands the runner, which knows nothing of it.
    STAGES    {heading: (what it stands for, commands as a user types them)}, "./" the demo's folder
    FIGURES   {name: "file : keys"}: numbers in JSON files that commands wrote; a folder stands for
              its metrics.json; `mean` and `max` are of all entries of a list or dict
    CLAIMS    "what the papers find | comparison of [figures]", or several joined by "and";
              [a: b > c] is short for [a, b] > [a, c], {*name} takes all choices of a name, joined
    CHOICES   what the {names} of all three stand for: a line is meant for every choice of those in
              it. Of a dict the keys are for people, the values go into files and keys
Commands also use SIZES and PIECES. Without its figures a claim is "not measured", never "no"; over
several seeds one that holds or fails by less than the standard deviation is "undecided".

Numbers before claims are the papers' tables, the thesis's unless another is named; "ours" are our
own questions. G and L: Global and Local TopK as trained, the one joint, the other alone.
"""
import contextlib
import html
import io
import itertools
import json
import os
import re
import shlex
import statistics
from pathlib import Path

import eval as judge
import repsae

RESULTS = Path(judge.__file__).resolve().parent / "assets" / "results.md"
SIZES = {  # of the demo, and of --quick
    False: {"pictures": 2400, "dino_epochs": 10, "clip_epochs": 40, "mil_epochs": 50, "runs": 3,
            "tune_epochs": 5, "code_epochs": 60, "token_epochs": 5, "least": 50, "most": 200},
    True: {"pictures": 600, "dino_epochs": 1, "clip_epochs": 2, "mil_epochs": 5, "runs": 2,
           "tune_epochs": 1, "code_epochs": 4, "token_epochs": 1, "least": 20, "most": 40}}
PIECES = {  # that commands share
    "tissue": "--images ./tissue/tissue.npz", "both": "dino_vit=./dino_vit,dino_vim=./dino_vim",
    "dino": "--size 64 --local-crops 4 --global-scale 0.5,1 --blur 0.5 --epochs {dino_epochs}",
    "mil": "--epochs {mil_epochs} --widths 64 --attention 32 --votes 3",
    "code": "--latents 256 --k 16 --batch 128 --lr 1e-3 --norm standard,l2 --epochs {code_epochs}",
    "segment": "--least {least} --most {most}",
    "tuned": "./finetune/dino_vit.pt", "before": "./dino_vit", "shared": "./ablate/global_lam1"}
SWEPT = {"latents": ["64", "256", "1024"], "k": ["4", "16", "64"]}
NAMED, SUMMED = "similarity to the name", "sum of concept latents"
SETS = {"a CLIP's encoders": "clip_img+clip_txt", "another CLIP's": "small_img+small_txt",
        "vision-only": "dino_vit+dino_vim", "images": "clip_img+small_img+dino_vit+dino_vim",
        "all eight": "clip_img+clip_txt+small_img+small_txt+dino_vit+dino_vim+words+pairs",
        "words alone": "words+pairs", "texts": "clip_txt+small_txt+words+pairs"}
CHOICES = {
    "side": ["64", "32"], "a": ["vit", "vim"], "s": ["dino", "random"], "topk": ["global", "local"],
    "head": ["mean of the bag, logistic", "abmil", "clam_sb"],
    "m": ["vit_micro", "vim_micro", "vmamba_micro", "resnet18", "dino_vit"],
    "win": ["vit_micro", "resnet18"], "lose": ["vim_micro", "vmamba_micro"],
    "run": {"G": "global_lam1 : joint", "G null": "global_lam1 : null.joint",
            "G alone": "global_lam1 : alone", "G alone null": "global_lam1 : null.alone",
            "G λ0": "global_lam0 : joint", "G alone λ0": "global_lam0 : alone",
            "L": "local_lam1 : alone", "L λ0": "local_lam0 : alone",
            "both alone": "both_lam1 : alone"}, "T": ["G", "L"], "A": ["G alone", "L"],
    "codes": {"apart": "the two runs, best pairing", "one": "SPARC alone, same latent"},
    "size": {f"{x} {n}": f"{x}/{x}{n}" for x, values in SWEPT.items() for n in values},
    **{x: [f"{x} {n}" for n in values] for x, values in SWEPT.items()}, "x": [*SWEPT],
    "way": {"G": "global : joint", "L": "local : alone", "G alone": "global : alone"},
    "set": SETS, "seen": [*SETS][:5], "read": [*SETS][5:], "what": ["self", "cross"],
    "b": ["dino_vit", "dino_vim (Grad-CAM)", "clip"], "b2": ["dino_vit", "clip"],
    "t": [SUMMED, NAMED, f"{NAMED}, joint"], "t2": [SUMMED, NAMED], "in": ["", "_local"],
    "when": ["tuned", "before"], "of": {"features": "original features", "code": "reconstructed"},
    "means": {"tuned": "--data", "before": "--other"}, "do": ["keep", "silence"],
    "by": ["best latents", "principal components", "kept, %"], "all": ["features", "chance"]}

STAGES = {
    "1. A tissue": ("Pictures of which all is known (Tables 3.1-3.3).", [
        "tissue --pictures {pictures} --out ./tissue"]),
    "2. DINO": ("3.2.1: backbones learn without labels; 3.2.4: where they look.", [
        "dino {tissue} --arch {a}_micro {dino} --out ./dino_{a}",
        "explain {tissue} --weights vit=./dino_vit,vim=./dino_vim --most 6 --out ./cam"]),
    "3. Linear evaluation": ("3.2.3, Tables 3.6; 3.8: at half the magnification.", [
        "extract {tissue} --weights {both},random_vit=vit_micro:random,random_vim=vim_micro:random "
        "--size {side} --standardise --out ./views_{side}.npz",
        "probe --data ./views_{side}.npz --json ./views_{side}.json"]),
    "4. Four streams": ("5.3.1: a small CLIP, and features by every encoder.", [
        "clip {tissue} --epochs {clip_epochs} --out ./clip",
        "extract {tissue} --weights {both},clip=./clip --out ./feats.npz"]),
    "5. Patients as bags": ("Table 3.5; 3.7: at half the magnification.", [
        "extract --images ./tissue/patients.npz --weights {both} --size {side} "
        "--out ./patients_{side}.npz",
        "mil --data ./patients_{side}.npz --stream dino_{a} --folds 5 --head abmil,clam_sb {mil} "
        "--out ./mil_{side}_{a}"]),
    "6. Slides": ("3.2.2: tiles of tissue, their features, what a head attends to.", [
        "tile --images ./tissue/slides --size 64 --out ./tiles",
        "extract --images ./tiles --weights dino_vim=./dino_vim --out ./slides.npz",
        "mil --data ./slides.npz --head abmil {mil} --out ./mil_slides"]),
    "7. Transfer": ("Tables 3.4, 3.9-3.11; ours is a pre-trained ViT beside them.", [
        "finetune {tissue} --label 'tumour cell' --split given --weights vit_micro,vim_micro,"
        "vmamba_micro,resnet18,dino_vit=./dino_vit --size 32 --lr 5e-4 --runs {runs} "
        "--epochs {tune_epochs} --out ./finetune"]),
    "9. One code for four models": ("Tables 5.1-5.3, 5.5; sparc.txt 1-4, 14.", [
        "ablate --data ./feats.npz --taxonomy ./tissue/taxonomy.json {code} --out ./ablate"]),
    "10. Latents in common": ("4.1, 4.3: two codes trained apart, and a shared one.", [
        "sae --data ./feats.npz --stream dino_{a} {code} --out ./sae_dino_{a}",
        "compare ./sae_dino_vit ./sae_dino_vim --sparc {shared} --json ./compare.json"]),
    **{f"11. More {x}": ("5.4.8, Fig. 5.8-5.9: what Global TopK costs and brings.", [
        f"sweep --over '{x}={','.join(values)} topk=global,local' --data ./feats.npz {{code}} "
        f"--out ./sweep_{x}"]) for x, values in SWEPT.items()},
    "12. Other sets of models": ("sparc.txt Tables 6-13; two only count words.", [
        "clip {tissue} --width 64 --set 'layers=3 joint=48' --epochs {clip_epochs} --out ./small",
        "extract {tissue} --weights {both},clip=./clip,small=./small,words=lsa:1,pairs=lsa:2 "
        "--out ./eight.npz",
        f"sweep --over 'streams={','.join(SETS.values())} topk=global,local' "
        "--data ./eight.npz {code} --out ./sweep_streams"]),
    "13. Back to pixels and words": ("5.4.4, Table 5.4, A.3, A.4: heat maps.", [
        "explain {shared} {tissue} --weights {both},clip=./clip {segment} --out ./segment",
        "explain ./ablate/local_lam1 {tissue} --weights dino_vit=./dino_vit,clip=./clip {segment} "
        "--out ./segment_local"]),
    "14. Retrieval": ("Tables 5.6-5.7, A.1-A.17, Fig. A.24-A.26: samples, words, another tissue.", [
        "retrieve ./ablate/{topk}_lam1 --sample 3 --from dino_vit --to clip_txt "
        "--out ./retrieve_{topk}",
        "retrieve {shared} --query 'several tumour cells and a mitosis' "
        "--encoder ./clip --from clip_txt --to dino_vit --out ./retrieve_words",
        "tissue --pictures 40 --out ./elsewhere --seed 1{seed}",
        "extract --images ./elsewhere/tissue.npz --weights dino_vit=./dino_vit "
        "--out ./elsewhere.npz",
        "retrieve {shared} --features ./elsewhere.npz --sample 3 --from dino_vit "
        "--to clip_txt --out ./retrieve_elsewhere"]),
    "15. Patients' barcodes": ("CytoSAE Fig. 2A, 4: latents of mean 0.001 or more.", [
        "latents {shared} --data ./patients_64.npz --stream dino_vit "
        "--between healthy,carcinoma --out ./latents"]),
    "16. What latents do, and where": (
        "Mammo-SAE Fig. 2, 4, Tables 1, 2: in the ViT tuned in chapter 7, and before that.", [
        "extract {tissue} --weights dino_vit={{when}} --tokens --size 64 --out ./tokens_{when}.npz",
        "sae --data ./tokens_tuned.npz --latents 256 --k 8 --batch 1024 --lr 1e-3 --norm standard "
        "--epochs {token_epochs} --out ./sae_tokens",
        "intervene ./sae_tokens --data ./tokens_{when}.npz --label 'tumour cell' "
        "--other ./tokens_before.npz --out ./mammo_{when}"]),
    "17. A few latents suffice": ("The TotalSegmentator study, for the vacuoles.", [
        "intervene ./sae_dino_vit --label vacuoles --out ./few"])}

FIGURES = {
    "20-NN AUC, {a}, random": "dino_{a} : knn_random",
    "20-NN AUC, {a}, DINO": "dino_{a} : knn",
    "probe AUC, {s} {a}, {side}": "views_{side}.json : {s}_{a}.linear.AUC",
    "bags AUC, {head}, {a}, {side}": "mil_{side}_{a} : {head}.mean.AUC",
    "AUC, pixels": "finetune : scores.pixels, logistic.mean.AUC",
    "AUC, {m}": "finetune : scores.{m}.mean.AUC",
    "parameters, {m}": "finetune : parameters.{m}",
    "{win} beats {lose}": "finetune : beats.AUC.{win}.{lose}",
    "same choice, {run}": "ablate/{run}.same_choice",
    "mixed %, {run}": "ablate/{run}.headline.mixed: alive in some, %",
    "Jaccard, {run}": "ablate/{run}.headline.Jaccard, other latents as 0",
    "Jaccard of top-50 labels, {run}": "ablate/{run}.headline.Jaccard of top-50 labels",
    "probe loss, {run}": "ablate/{run}.probe.mean.loss",
    "R@1, {run}": "ablate/{run}.headline.retrieval R@1",
    "R2 cross, {run}": "ablate/{run}.headline.R2 cross",
    "in common, %, {codes}": "compare.json : {codes}.shared, %",
    "NMSE {what}, {size}, {way}": "sweep_{size}_{way}.headline.NMSE {what}",
    "R2 cross, {set}, {way}": "sweep_streams/{set}_{way}.headline.R2 cross",
    "mIoU, {b}, {t}": "segment : segmentation.{b}, {t}.mIoU",
    "mIoU, {b}, random latents": "segment : segmentation.{b}, random latents.mIoU",
    "mIoU, CLIP's similarity": "segment : segmentation.clip, raw similarity.mIoU",
    "mIoU, centre": "segment : segmentation.centre of the picture.mIoU",
    "mIoU, {b2}, {t2}, Local": "segment_local : segmentation.{b2}, {t2}.mIoU",
    "absent drawn %, {b2}, {t2}": "segment : segmentation.{b2}, {t2}.drawn though absent, %",
    "absent{in}": "segment{in} : segmentation.max.absent",
    "not 0{in}": "segment{in} : segmentation.max.not 0",
    "barcodes, weighted F1": "latents : barcodes.f1.-3.f1.mean",
    "AUC of {of}, {when}": "mammo_{when} : auc.{of}.AUC",
    "AUC, top ten, {do}": "mammo_tuned : curve.10.{do}",
    "AP of the top ten, {when}": "mammo_{when} : localisation.mean.AP",
    "AP of the best, {when}": "mammo_{when} : localisation.max.AP",
    "cosine of means, {means}": "mammo_tuned : separation.{means}.cosine",
    "R2": "few : r2.variance-weighted.R2",
    "probe, {all}": "few : probe.{all}.balanced accuracy",
    "probe, ten, {by}": "few : few.10.{by}",
    "overlap of 10 neighbours": "few : neighbours.10.overlap"}

CLAIMS = (
    "ours: DINO finds better neighbours than random weights, {a} | [20-NN AUC, {a}: DINO > random]",
    "3.6: Vim is ahead of ViT in linear evaluation | [probe AUC: dino vim, 64 > dino vit, 64]",
    "3.8: half the magnification is worse in linear evaluation | [probe AUC, dino {*a}: 32 < 64]",
    "ours: DINO is ahead of random weights in linear evaluation, {a} | "
    "[probe AUC: dino {a}, 64 > random {a}, 64]",
    "3.5: Vim is ahead of ViT on bags | [bags AUC, clam_sb: vim, 64 > vit, 64]",
    "3.7: half the magnification is worse on bags, {a} | [bags AUC, clam_sb, {a}: 32 < 64]",
    "3.9-3.11: no Mamba is significantly beaten, in so few runs | [{*win} beats {*lose}] < 1",
    "5.1: all choose alike under Global, joint (mixed: ReLU's zeros) | [same choice, G] >= 1",
    "5.1: less than 1 % of latents are mixed under Global, joint | [mixed %, G] < 1",
    "ours: fewer are mixed under Global, alone | [mixed %: G alone < L]",
    "5.2: Global has a higher Jaccard, as trained | [Jaccard: G > L]",
    "5.2: λ = 1 has a higher Jaccard than 0 | [Jaccard: {*T} > {*T} λ0]",
    "ours: Global has a higher Jaccard, alone | [Jaccard: G alone > L]",
    "ours: higher than for shuffled pairs, joint | [Jaccard: G > G null]",
    "5.3: 1-D probes do better under Local | [probe loss: L < G]",
    "5.3: 1-D probes do better at λ = 0 | [probe loss: G λ0 < G]",
    "5.5: Global retrieves better, alone | [R@1: G alone > L]",
    "5.5: λ = 1 retrieves better than 0, alone | [R@1: {*A} > {*A} λ0]",
    "ours: Global retrieves better than for shuffled pairs, alone | [R@1: G alone > G alone null]",
    "sparc 3: Global crosses better, as trained | [R2 cross: G > L]",
    "ours: Global crosses better, alone | [R2 cross: G alone > L]",
    "4.3: one code has more in common than two, alone | [in common, %: one > apart]",
    "5.8: Global costs self reconstruction for every {x}, joint | [NMSE self, {*{x}}: G > L]",
    "5.8: Global brings cross reconstruction for every {x}, joint | [NMSE cross, {*{x}}: G < L]",
    "ours: Global crosses better for every {x}, alone | [NMSE cross, {*{x}}: G alone < L]",
    "sparc 7-9, 11, 13: Global is better across {seen}, as trained | [R2 cross, {seen}: G > L]",
    "sparc 10, 12: Local is better across {read}, as trained | [R2 cross, {read}: G < L]",
    "ours: Global is better across every set, alone | [R2 cross, {*set}: G alone > L]",
    "ours: {b}, {t}: better than random latents | [mIoU, {b}: {t} > random latents]",
    "5.4: names guide the vision-only ViT to nine tenths of CLIP's similarity | "
    f"[mIoU, dino_vit, {NAMED}] > 0.9 * [mIoU, CLIP's similarity]",
    "5.4: Global segments better than Local: {b2}, {t2} | [mIoU, {b2}: {t2} > {t2}, Local]",
    "A.3.3: concept latents draw what is absent less often than similarity does, {b2} | "
    f"[absent drawn %, {{b2}}: {SUMMED} < {NAMED}]",
    "ours: a score of 0 has a map of zeros, a theorem | [absent{*in}] > 0 and [not 0{*in}] <= 0",
    "ours: barcodes tell four diseases apart | [barcodes, weighted F1] > 1 / 4",
    "Mammo 1: fine-tuned features tell the label better | [AUC of features: tuned > before]",
    "Mammo 1: the reconstruction's AUC is within 0.025 of the features', either way | "
    "abs([AUC of features, {*when}] - [AUC of code, {*when}]) <= 0.025",
    "Mammo Fig. 2a: ten latents of each class keep nine tenths of it, beyond chance | "
    "[AUC of code, tuned] > 0.55 and "
    "[AUC, top ten, keep] - 0.5 >= 0.9 * ([AUC of code, tuned] - 0.5)",
    "Mammo Fig. 2b: silencing these leaves at most half | [AUC of code, tuned] > 0.55 and "
    "[AUC, top ten, silence] - 0.5 <= 0.5 * ([AUC of code, tuned] - 0.5)",
    "Mammo 2: fine-tuned latents find the boxes better | [AP of the top ten: tuned > before]",
    "Mammo Fig. 4: fine-tuning moves the class means apart | [cosine of means: tuned < before]",
    "TotalSegmentator: ten latents keep 87.8 % of the probe, beyond chance | "
    "[probe, features] - [probe, chance] > 0.05 and [probe, ten, kept, %] >= 87.8",
    "ours: ten latents keep more than ten principal components | "
    "[probe, ten: best latents > principal components]")


# -- the runner ----------------------------------------------------------------------------------

def fill(text, values):
    """`text` with every {name} replaced by its value."""
    for name, value in values.items():
        text = text.replace("{" + name + "}", str(value))
    return text


def choices(text):
    """Every choice for the {names} that are in the text, as dicts."""
    names = [name for name in CHOICES if "{" + name + "}" in text]
    return [dict(zip(names, v)) for v in itertools.product(*(CHOICES[name] for name in names))]


def commands(out, quick, seed):
    """Yield (heading, words of a command) in order."""
    values = {**PIECES, **SIZES[quick], "seed": seed}
    for stage, (_, lines) in STAGES.items():
        for run in lines:
            for one in choices(run):
                words = shlex.split(fill(fill(run, one), values))
                if "seed" in repsae.COMMANDS[words[0]].flags and "--seed" not in words:
                    words += ["--seed", str(seed)]
                yield stage, [word.replace("./", f"{out}/") for word in words]


def follow(found, keys):
    """What a list of keys leads to in what a JSON file holds; None where it leads nowhere."""
    if not keys or found is None:
        return found
    key, *rest = keys
    if isinstance(found, dict) and key in found:
        return follow(found[key], rest)
    if key not in ("mean", "max"):
        return None
    entries = found.values() if isinstance(found, dict) else found
    values = [v for v in (follow(one, rest) for one in entries) if v is not None]
    return {"mean": statistics.fmean, "max": max}[key](values) if values else None


def figures(out):
    """dict name -> number, None where there is none, in the demo's folder."""
    found = {}
    for name, path in FIGURES.items():
        for one in choices(name + path):
            inside = {key: CHOICES[key][v] if isinstance(CHOICES[key], dict) else v
                      for key, v in one.items()}
            file, _, keys = fill(path, inside).partition(" : ")
            file = Path(out, file if file.endswith(".json") else f"{file}/metrics.json")
            number = follow(json.loads(text_of(file) or "null"), keys.split("."))
            found[fill(name, one)] = number if isinstance(number, (int, float)) else None
    return found


def claims():
    """Yield (claim, comparisons of figures that must all hold)."""
    for claim in CLAIMS:
        for one in choices(claim):
            text, _, rule = fill(claim, one).partition(" | ")
            rule = re.sub(r"\[([^]]+): ([^]]+) ([<>]) ([^]]+)\]", r"[\1, \2] \3 [\1, \4]", rule)
            yield text, [fill(part, more) for part in rule.replace("{*", "{").split(" and ")
                         for more in choices(part)]


def margin(comparison, figures):
    """By how much a comparison of [figures] holds, negative where not; None if a figure lacks."""
    if any(figures.get(name) is None for name in re.findall(r"\[(.+?)\]", comparison)):
        return None
    numbers = re.sub(r"\[(.+?)\]", lambda name: f"({figures[name[1]]!r})", comparison)
    left, sign, right = re.fullmatch("(.+) ([<>]=?) (.+)", numbers).groups()
    gap = eval(left) - eval(right)                           # the table above is our own code
    return gap if sign[0] == ">" else -gap


def verdict(comparisons, seeds):
    """Whether all comparisons hold, in words; seeds: the figures of each."""
    words = []
    for comparison in comparisons:
        gaps = [margin(comparison, figures) for figures in seeds]
        if None in gaps:
            return "not measured"
        mean, spread = statistics.fmean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else 0
        holds = mean > 0 or mean == 0 and "=" in comparison
        words.append("undecided" if abs(mean) < spread else "yes" if holds else "no")
    return next(word for word in ("no", "undecided", "yes") if word in words)


def demo(out, quick, seed, seeds):
    """Every stage for every seed; then all figures, and what the papers find in them."""
    folders = {n: f"{out}/seed{n}" if seeds > 1 else out for n in range(seed, seed + seeds)}
    told = [run_stages(folder, quick, n) for n, folder in folders.items()]
    each = [figures(folder) for folder in folders.values()]
    found = {name: [one[name] for one in each] for name in each[0]}
    asked = {} if quick else {text: verdict(rule, each) for text, rule in claims()}
    page = judge.Page(f"repsae demo: made-up tissue, {seeds} seed{'s' * (seeds > 1)}")
    page.text("Small models, trained for minutes on made-up pictures: trends, not figures.", True)
    tables = [(["what the papers find, and we ask", "is it so?"], asked.items()),
              (["figure", "mean ± std"], [(name, judge.mean_std(v) if seeds > 1 else v[0])
                                          for name, v in found.items()])][quick:]
    for table in tables:
        page.table(*table)
    for name, body in told[0]:
        page.picture(name, body)
    judge.write_json(os.path.join(out, "findings.json"), {"claims": asked, "figures": found})
    page.write(lambda name: os.path.join(out, name))
    if seeds > 1 and not quick:
        kept = re.sub(r"(?ms)^## \w+ seeds of the demo$.*?(?=^## |\Z)", "", text_of(RESULTS))
        told = "".join(f"\n```\n{judge.text_table(*table)}\n```\n" for table in tables)
        judge.write_text(RESULTS, f"{kept.rstrip()}\n\n## {seeds} seeds of the demo\n{told}")


def run_stages(out, quick, seed):
    """Run every command that is not done yet, and all after it: [(heading, what it told, HTML)]."""
    os.makedirs(out, exist_ok=True)
    todo, told = list(commands(out, quick, seed)), []
    files = [Path(out, f"command_{n:02d}.txt") for n, _ in enumerate(todo, 1)]
    for n, (file, (stage, argv)) in enumerate(zip(files, todo), 1):
        command = shlex.join(["python", "repsae.py", *argv])
        made = argv[argv.index("--out" if "--out" in argv else "--json") + 1]
        if not os.path.exists(made) or not text_of(file).startswith(f"{command}\n"):
            for later in files[n:]:                          # they may have read what is made anew
                later.unlink(missing_ok=True)
            repsae.say(f"== {stage}: {command}")
            run_command(argv, command, file)
        links = [f'<p><a href="{os.path.relpath(page, out)}">{page}</a></p>'
                 for page in (f"{made}/report.html", f"{made}/sheet.png") if os.path.exists(page)]
        about = f"<p>{html.escape(STAGES[stage][0])}</p><pre>{html.escape(text_of(file))}</pre>"
        told.append((stage, about + "".join(links)))
    return told


def run_command(argv, command, file):
    """Run a command and keep what it prints in a file, or resume it: then the file has it alone."""
    takes, printed = repsae.COMMANDS[argv[0]].flags, io.StringIO()
    again = "resume" if "resume" in takes and text_of(file) == command else "overwrite"
    judge.write_text(file, command)
    try:
        with contextlib.redirect_stdout(printed):
            repsae.perform(*repsae.parse([*argv, *[f"--{again}"] * (again in takes)]))
    except repsae.Interrupted as e:
        repsae.say(f"\n{e}; the same demo command goes on from there")
        raise SystemExit(130)
    finally:
        repsae.Run.release()
    print(printed.getvalue(), end="", flush=True)
    judge.write_text(file, f"{command}\n{printed.getvalue()}")


def text_of(path):
    """A file's text, "" where there is none."""
    return Path(path).read_text() if os.path.exists(path) else ""
