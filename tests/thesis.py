"""All of it on made-up tissue: what `python repsae.py demo` runs, and what it asks of the results.

STAGES is the experiment; below it stands the runner, which knows none of them. A stage has
    name, about   its heading, and what it stands for
    run           commands as a user types them, "./" being the demo's folder; {names} are those of
                  SIZES, PIECES and `each`: a command is run for every choice of `each` it names
    figures       {name: "file : keys"}, numbers in JSON files that commands wrote; a folder stands
                  for its metrics.json; `mean` and `max` are of all entries of a list or dict. One
                  for every choice of `each` and `over`; of a dict the keys go into the name, the
                  values into the path
    claims        "what the papers find | comparison of [figures]", or several joined by "and";
                  {*name} takes all its values, joined so
A figure that is not there makes a claim "not measured", never "no"; over several seeds one that
holds or fails by less than the standard deviation is "undecided". `--quick` judges nothing.

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
    "tissue": "--images ./tissue/tissue.npz",
    "both": "dino_vit=./dino_vit,dino_vim=./dino_vim",
    # pixels in their own units: by ImageNet's these pale pictures are all alike, and DINO collapses
    "dino": "--patch 8 --size 64 --local-size 32 --local-crops 4 --local-scale 0.2,0.6 "
            "--global-scale 0.5,1 --standardise --colour 0.2 --blur 0.5 --prototypes 1024 "
            "--head-hidden 512 --set bottleneck=64 --batch 64 --warmup 1 --lr 2e-3 --momentum 0.99 "
            "--workers 1 --epochs {dino_epochs}",
    "mil": "--epochs {mil_epochs} --widths 64 --attention 32 --votes 3",
    "code": "--latents 256 --k 16 --batch 128 --lr 1e-3 --norm standard,l2 --epochs {code_epochs}",
    "segment": "--least {least} --most {most}",
    "tuned": "./finetune/dino_vit.pt", "before": "./dino_vit"}
SIDES, ARCHS = ["64", "32"], ["vit", "vim"]
SWEPT = {"latents": ["64", "256", "1024"], "k": ["4", "16", "64"]}
WAYS = {"G": "global : joint", "L": "local : alone", "G alone": "global : alone"}
SETS = {"a CLIP's encoders": "clip_img+clip_txt", "another CLIP's": "small_img+small_txt",
        "vision-only": "dino_vit+dino_vim", "images": "clip_img+small_img+dino_vit+dino_vim",
        "all eight": "clip_img+clip_txt+small_img+small_txt+dino_vit+dino_vim+words+pairs",
        "words alone": "words+pairs", "texts": "clip_txt+small_txt+words+pairs"}
NAMED, SUMMED = "similarity to the name", "sum of concept latents"

STAGES = (
    dict(name="1. A tissue", about="Pictures of which all is known (Tables 3.1-3.3).",
         run=["tissue --pictures {pictures} --out ./tissue"]),
    dict(name="2. DINO", about="3.2.1: backbones learn without labels; 3.2.4: where they look.",
         each={"a": ARCHS}, run=[
             "dino {tissue} --arch {a}_micro {dino} --out ./dino_{a}",
             "explain {tissue} --weights vit=./dino_vit,vim=./dino_vim --most 6 --out ./cam"],
         figures={"20-NN AUC, {a}, random": "dino_{a} : knn_random",
                  "20-NN AUC, {a}, DINO": "dino_{a} : knn"},
         claims=["ours: DINO finds better neighbours than random weights, {a} | "
                 "[20-NN AUC, {a}, DINO] > [20-NN AUC, {a}, random]"]),
    dict(name="3. Linear evaluation", about="3.2.3, Tables 3.6; 3.8: at half the magnification.",
         each={"side": SIDES},
         run=["extract {tissue} --weights {both},random_vit=vit_micro:random,random_vim=vim_micro:"
              "random --last 1 --size {side} --standardise --out ./views_{side}.npz",
              "probe --data ./views_{side}.npz --json ./views_{side}.json"],
         over={"s": ["dino", "random"], "a": ARCHS},
         figures={"probe AUC, {s} {a}, {side}": "views_{side}.json : {s}_{a}.linear.AUC"},
         claims=["3.6: Vim is ahead of ViT in linear evaluation | "
                 "[probe AUC, dino vim, 64] > [probe AUC, dino vit, 64]",
                 "3.8: half the magnification is worse in linear evaluation | "
                 "[probe AUC, dino {*a}, 32] < [probe AUC, dino {*a}, 64]",
                 "ours: DINO is ahead of random weights in linear evaluation, {a} | "
                 "[probe AUC, dino {a}, 64] > [probe AUC, random {a}, 64]"]),
    dict(name="4. Four streams", about="5.3.1: a small CLIP, and features by every encoder.",
         run=["clip {tissue} --epochs {clip_epochs} --out ./clip",
              "extract {tissue} --weights {both},clip=./clip --last 1 --out ./feats.npz"]),
    dict(name="5. Patients as bags", about="Table 3.5; 3.7: at half the magnification.",
         each={"side": SIDES, "a": ARCHS},
         run=["extract --images ./tissue/patients.npz --weights {both} --last 1 --size {side} "
              "--out ./patients_{side}.npz",
              "mil --data ./patients_{side}.npz --stream dino_{a} --folds 5 --head abmil,clam_sb "
              "{mil} --out ./mil_{side}_{a}"],
         over={"h": ["mean of the bag, logistic", "abmil", "clam_sb"]},
         figures={"bags AUC, {h}, {a}, {side}": "mil_{side}_{a} : {h}.mean.AUC"},
         claims=["3.5: Vim is ahead of ViT on bags | "
                 "[bags AUC, clam_sb, vim, 64] > [bags AUC, clam_sb, vit, 64]",
                 "3.7: half the magnification is worse on bags, {a} | "
                 "[bags AUC, clam_sb, {a}, 32] < [bags AUC, clam_sb, {a}, 64]"]),
    dict(name="6. Slides", about="3.2.2: tiles of tissue, their features, what a head attends to.",
         run=["tile --images ./tissue/slides --size 64 --out ./tiles",
              "extract --images ./tiles --weights dino_vim=./dino_vim --last 1 --out ./slides.npz",
              "mil --data ./slides.npz --head abmil {mil} --out ./mil_slides"]),
    dict(name="7. Transfer", about="Tables 3.4, 3.9-3.11; ours is a pre-trained ViT beside them.",
         run=["finetune {tissue} --label 'tumour cell' --split given --weights "
              "vit_micro,vim_micro,vmamba_micro,resnet18,dino_vit=./dino_vit --size 32 --lr 5e-4 "
              "--runs {runs} --epochs {tune_epochs} --out ./finetune"],
         over={"m": ["vit_micro", "vim_micro", "vmamba_micro", "resnet18", "dino_vit"],
               "win": ["vit_micro", "resnet18"], "lose": ["vim_micro", "vmamba_micro"]},
         figures={"AUC, pixels": "finetune : scores.pixels, logistic.mean.AUC",
                  "AUC, {m}": "finetune : scores.{m}.mean.AUC",
                  "parameters, {m}": "finetune : parameters.{m}",
                  "{win} beats {lose}": "finetune : beats.AUC.{win}.{lose}"},
         claims=["3.9-3.11: no Mamba is significantly beaten by another kind, in so few runs | "
                 "[{*win} beats {*lose}] < 1"]),
    dict(name="9. One code for four models", about="Tables 5.1-5.3, 5.5; sparc.txt 1-4, 14.",
         run=["ablate --data ./feats.npz --taxonomy ./tissue/taxonomy.json {code} --out ./ablate"],
         over={"w": {"G": "global_lam1 : joint", "G null": "global_lam1 : null.joint",
                     "G alone": "global_lam1 : alone", "G alone null": "global_lam1 : null.alone",
                     "G λ0": "global_lam0 : joint", "G alone λ0": "global_lam0 : alone",
                     "L": "local_lam1 : alone", "L λ0": "local_lam0 : alone",
                     "both alone": "both_lam1 : alone"}, "T": ["G", "L"], "A": ["G alone", "L"]},
         figures={"same choice, {w}": "ablate/{w}.same_choice",
                  "mixed %, {w}": "ablate/{w}.headline.mixed: alive in some, %",
                  "Jaccard, {w}": "ablate/{w}.headline.Jaccard, other latents as 0",
                  "Jaccard of top-50 labels, {w}": "ablate/{w}.headline.Jaccard of top-50 labels",
                  "probe loss, {w}": "ablate/{w}.probe.mean.loss",
                  "R@1, {w}": "ablate/{w}.headline.retrieval R@1",
                  "R2 cross, {w}": "ablate/{w}.headline.R2 cross"},
         claims=["5.1: under Global TopK all streams choose the same latents, joint: those mixed "
                 "are ReLU's zeros | [same choice, G] >= 1",
                 "5.1: under Global TopK less than 1 % are mixed, joint | [mixed %, G] < 1",
                 "ours: fewer are mixed under Global, alone | [mixed %, G alone] < [mixed %, L]",
                 "5.2: Global has a higher Jaccard, as trained | [Jaccard, G] > [Jaccard, L]",
                 "5.2: λ = 1 has a higher Jaccard than 0 | [Jaccard, {*T}] > [Jaccard, {*T} λ0]",
                 "ours: Global has a higher Jaccard, alone | [Jaccard, G alone] > [Jaccard, L]",
                 "ours: higher than for shuffled pairs, joint | [Jaccard, G] > [Jaccard, G null]",
                 "5.3: 1-D probes do better under Local | [probe loss, L] < [probe loss, G]",
                 "5.3: 1-D probes do better at λ = 0 | [probe loss, G λ0] < [probe loss, G]",
                 "5.5: Global retrieves better, alone | [R@1, G alone] > [R@1, L]",
                 "5.5: λ = 1 retrieves better than 0, alone | [R@1, {*A}] > [R@1, {*A} λ0]",
                 "ours: Global retrieves better than for shuffled pairs, alone | "
                 "[R@1, G alone] > [R@1, G alone null]",
                 "sparc 3: Global crosses better, as trained | [R2 cross, G] > [R2 cross, L]",
                 "ours: Global crosses better, alone | [R2 cross, G alone] > [R2 cross, L]"]),
    dict(name="10. Latents in common", about="4.1, 4.3: two codes trained apart, and a shared one.",
         each={"a": ARCHS},
         run=["sae --data ./feats.npz --stream dino_{a} {code} --out ./sae_dino_{a}",
              "compare ./sae_dino_vit ./sae_dino_vim --sparc ./ablate/global_lam1 "
              "--json ./compare.json"],
         over={"of": {"apart": "the two runs, best pairing", "one": "SPARC alone, same latent"}},
         figures={"in common, %, {of}": "compare.json : {of}.shared, %"},
         claims=["4.3: one code has more in common than two, alone | "
                 "[in common, %, one] > [in common, %, apart]"]),
    *(dict(name=f"11. More {x}", about="5.4.8, Fig. 5.8-5.9: what Global TopK costs and brings.",
           run=[f"sweep --over '{x}={','.join(values)} topk=global,local' --data ./feats.npz "
                "{code} --out ./sweep_{x}"],
           each={"x": [x]}, over={"n": values, "w": WAYS, "what": ["self", "cross"]},
           figures={"NMSE {what}, {x} {n}, {w}": "sweep_{x}/{x}{n}_{w}.headline.NMSE {what}"},
           claims=["5.8: Global costs self reconstruction for every {x}, joint | "
                   "[NMSE self, {x} {*n}, G] > [NMSE self, {x} {*n}, L]",
                   "5.8: Global brings cross reconstruction for every {x}, joint | "
                   "[NMSE cross, {x} {*n}, G] < [NMSE cross, {x} {*n}, L]",
                   "ours: Global brings cross reconstruction for every {x}, alone | "
                   "[NMSE cross, {x} {*n}, G alone] < [NMSE cross, {x} {*n}, L]"])
      for x, values in SWEPT.items()),
    dict(name="12. Other sets of models", about="sparc.txt Tables 6-13; two only count words.",
         run=["clip {tissue} --width 64 --set 'layers=3 joint=48' --epochs {clip_epochs} "
              "--out ./small",
              "extract {tissue} --weights {both},clip=./clip,small=./small,words=lsa:1,pairs=lsa:2 "
              "--last 1 --out ./eight.npz", f"sweep --over 'streams={','.join(SETS.values())} "
              "topk=global,local' --data ./eight.npz {code} --out ./sweep_streams"],
         over={"of": SETS, "w": WAYS, "seen": [*SETS][:5], "read": [*SETS][5:]},
         figures={"R2 cross, {of}, {w}": "sweep_streams/{of}_{w}.headline.R2 cross"},
         claims=["sparc 7-9, 11, 13: Global is better across {seen}, as trained | "
                 "[R2 cross, {seen}, G] > [R2 cross, {seen}, L]",
                 "sparc 10, 12: Local is better across {read}, as trained | "
                 "[R2 cross, {read}, G] < [R2 cross, {read}, L]",
                 "ours: Global is better across every set, alone | "
                 "[R2 cross, {*of}, G alone] > [R2 cross, {*of}, L]"]),
    dict(name="13. Back to pixels and words", about="5.4.4, Table 5.4, A.3, A.4: heat maps.",
         run=["explain ./ablate/global_lam1 {tissue} --weights {both},clip=./clip {segment} "
              "--out ./segment", "explain ./ablate/local_lam1 {tissue} --weights "
              "dino_vit=./dino_vit,clip=./clip {segment} --out ./segment_local"],
         over={"b": ["dino_vit", "dino_vim (Grad-CAM)", "clip"], "b2": ["dino_vit", "clip"],
               "t": [SUMMED, NAMED, f"{NAMED}, joint"], "t2": [SUMMED, NAMED],
               "in": ["", "_local"]},
         figures={"mIoU, {b}, {t}": "segment : segmentation.{b}, {t}.mIoU",
                  "mIoU, {b}, random latents": "segment : segmentation.{b}, random latents.mIoU",
                  "mIoU, CLIP's similarity": "segment : segmentation.clip, raw similarity.mIoU",
                  "mIoU, centre": "segment : segmentation.centre of the picture.mIoU",
                  "mIoU, {b2}, {t2}, Local": "segment_local : segmentation.{b2}, {t2}.mIoU",
                  "absent drawn %, {b2}, {t2}":
                      "segment : segmentation.{b2}, {t2}.drawn though absent, %",
                  "absent{in}": "segment{in} : segmentation.max.absent",
                  "not 0{in}": "segment{in} : segmentation.max.not 0"},
         claims=["ours: {b}, {t}: better than random latents | "
                 "[mIoU, {b}, {t}] > [mIoU, {b}, random latents]",
                 "5.4: names guide the vision-only ViT to nine tenths of CLIP's similarity | "
                 f"[mIoU, dino_vit, {NAMED}] > 0.9 * [mIoU, CLIP's similarity]",
                 "5.4: Global segments better than Local: {b2}, {t2} | "
                 "[mIoU, {b2}, {t2}] > [mIoU, {b2}, {t2}, Local]",
                 "A.3.3: concept latents draw what is absent less often than similarity does, {b2} "
                 f"| [absent drawn %, {{b2}}, {SUMMED}] < [absent drawn %, {{b2}}, {NAMED}]",
                 "ours: a score of 0 has a map of zeros, a theorem | "
                 "[absent{*in}] > 0 and [not 0{*in}] <= 0"]),
    dict(name="14. Retrieval", about="Tables 5.6, 5.7, A.1-A.17, Fig. A.24-A.26: by samples, by "
         "words that are no caption, by another tissue.", each={"topk": ["global", "local"]},
         run=["retrieve ./ablate/{topk}_lam1 --sample 3 --from dino_vit --to clip_txt "
              "--out ./retrieve_{topk}",
              "retrieve ./ablate/global_lam1 --query 'several tumour cells and a mitosis' "
              "--encoder ./clip --from clip_txt --to dino_vit --out ./retrieve_words",
              "tissue --pictures 40 --out ./elsewhere --seed 1{seed}",
              "extract --images ./elsewhere/tissue.npz --weights dino_vit=./dino_vit --last 1 "
              "--out ./elsewhere.npz",
              "retrieve ./ablate/global_lam1 --features ./elsewhere.npz --sample 3 --from dino_vit "
              "--to clip_txt --out ./retrieve_elsewhere"]),
    dict(name="15. Patients' barcodes", about="CytoSAE Fig. 2A, 4: latents of mean 0.001 or more.",
         run=["latents ./ablate/global_lam1 --data ./patients_64.npz --stream dino_vit --between "
              "healthy,carcinoma --out ./latents"],
         figures={"barcodes, weighted F1": "latents : barcodes.f1.-3.f1.mean"},
         claims=["ours: barcodes tell four diseases apart | [barcodes, weighted F1] > 1 / 4"]),
    dict(name="16. What latents do, and where", about="Mammo-SAE Fig. 2, 4, Tables 1, 2: in "
         "the ViT tuned for tumour cells (chapter 7) and in what it was before.",
         each={"when": ["tuned", "before"]},
         run=["extract {tissue} --weights dino_vit={{when}} --tokens --size 64 "
              "--out ./tokens_{when}.npz",
              "sae --data ./tokens_tuned.npz --latents 256 --k 8 --batch 1024 --lr 1e-3 --norm "
              "standard --epochs {token_epochs} --out ./sae_tokens",
              "intervene ./sae_tokens --data ./tokens_{when}.npz --label 'tumour cell' "
              "--other ./tokens_before.npz --out ./mammo_{when}"],
         over={"of": {"features": "original features", "code": "reconstructed"},
               "do": ["keep", "silence"], "set": {"tuned": "--data", "before": "--other"}},
         figures={"AUC of {of}, {when}": "mammo_{when} : auc.{of}.AUC",
                  "AUC, top ten, {do}": "mammo_tuned : curve.10.{do}",
                  "AP of the top ten, {when}": "mammo_{when} : localisation.mean.AP",
                  "AP of the best, {when}": "mammo_{when} : localisation.max.AP",
                  "cosine of means, {set}": "mammo_tuned : separation.{set}.cosine"},
         claims=["Mammo 1: fine-tuned features tell the label better | "
                 "[AUC of features, tuned] > [AUC of features, before]",
                 "Mammo 1: the reconstruction's AUC is within 0.025 of the features', either way | "
                 "abs([AUC of features, {*when}] - [AUC of code, {*when}]) <= 0.025",
                 "Mammo Fig. 2a: ten latents of each class keep nine tenths of it, beyond chance | "
                 "[AUC of code, tuned] > 0.55 and "
                 "[AUC, top ten, keep] - 0.5 >= 0.9 * ([AUC of code, tuned] - 0.5)",
                 "Mammo Fig. 2b: silencing these leaves at most half | [AUC of code, tuned] > 0.55 "
                 "and [AUC, top ten, silence] - 0.5 <= 0.5 * ([AUC of code, tuned] - 0.5)",
                 "Mammo 2: fine-tuned latents find the boxes better | "
                 "[AP of the top ten, tuned] > [AP of the top ten, before]",
                 "Mammo Fig. 4: fine-tuning moves the class means apart, by cosine | "
                 "[cosine of means, tuned] < [cosine of means, before]"]),
    dict(name="17. A few latents suffice", about="The TotalSegmentator study, for the vacuoles.",
         run=["intervene ./sae_dino_vit --label vacuoles --out ./few"],
         over={"by": ["best latents", "principal components", "kept, %"],
               "all": ["features", "chance"]},
         figures={"R2": "few : r2.variance-weighted.R2",
                  "probe, {all}": "few : probe.{all}.balanced accuracy",
                  "probe, ten, {by}": "few : few.10.{by}",
                  "overlap of 10 neighbours": "few : neighbours.10.overlap"},
         claims=["TotalSegmentator: ten latents keep 87.8 % of the probe, beyond chance | "
                 "[probe, features] - [probe, chance] > 0.05 and [probe, ten, kept, %] >= 87.8",
                 "ours: ten latents keep more than ten principal components | "
                 "[probe, ten, best latents] > [probe, ten, principal components]"]))


# -- the runner ----------------------------------------------------------------------------------

def fill(text, values):
    """`text` with every {name} replaced by its value."""
    for name, value in values.items():
        text = text.replace("{" + name + "}", str(value))
    return text


def choices(text, stage):
    """Every choice of a stage's values for the {names} that are in the text, as dicts."""
    options = {**stage.get("each", {}), **stage.get("over", {})}
    names = [name for name in options if "{" + name + "}" in text]
    return [dict(zip(names, v)) for v in itertools.product(*(options[name] for name in names))]


def commands(out, quick, seed):
    """Yield (stage, words of a command) in order."""
    values = {**PIECES, **SIZES[quick], "seed": seed}
    for stage in STAGES:
        for run in stage["run"]:
            for one in choices(run, stage):
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


def figures_of(stage, out):
    """dict name -> number, None where there is none, of a stage in the demo's folder."""
    found, over = {}, stage.get("over", {})
    for name, path in stage.get("figures", {}).items():
        for one in choices(name + path, stage):
            inside = {key: over[key][v] if isinstance(over.get(key), dict) else v
                      for key, v in one.items()}
            file, _, keys = fill(path, inside).partition(" : ")
            file = Path(out, file if file.endswith(".json") else f"{file}/metrics.json")
            number = follow(json.loads(text_of(file) or "null"), keys.split("."))
            found[fill(name, one)] = number if isinstance(number, (int, float)) else None
    return found


def claims_of(stage):
    """Yield (claim, comparisons of figures that must all hold)."""
    for claim in stage.get("claims", ()):
        for one in choices(claim, stage):
            text, _, rule = fill(claim, one).partition(" | ")
            yield text, [fill(part, more) for part in rule.replace("{*", "{").split(" and ")
                         for more in choices(part, stage)]


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
    numbers = range(seed, seed + seeds)
    folders = [out] if seeds == 1 else [os.path.join(out, f"seed{n}") for n in numbers]
    stages = [run_stages(folder, quick, n) for folder, n in zip(folders, numbers)]
    found = [{k: v for stage in STAGES for k, v in figures_of(stage, at).items()} for at in folders]
    figures = {name: [one[name] for one in found] for name in found[0]}
    page = judge.Page(f"repsae demo: made-up tissue, {seeds} seed{'s' * (seeds > 1)}")
    page.text("Small models, trained for minutes on made-up pictures: trends, not figures.", True)
    claims = {} if quick else {
        text: verdict(rule, found) for stage in STAGES for text, rule in claims_of(stage)}
    tables = [] if quick else [(["what the papers find, and we ask", "is it so?"], claims.items())]
    tables += [(["figure", "mean ± std"], [
        (k, judge.mean_std(v) if seeds > 1 else v[0]) for k, v in figures.items()])]
    for table in tables:
        page.table(*table)
    for name, body in stages[0]:
        page.picture(name, body)
    judge.write_json(os.path.join(out, "findings.json"), {"claims": claims, "figures": figures})
    page.write(lambda name: os.path.join(out, name))
    if seeds > 1 and not quick:
        old = re.compile(r"^## \w+ seeds of the demo$.*?(?=^## |\Z)", re.M | re.S)
        kept = old.sub("", text_of(RESULTS)).rstrip()
        told = "".join(f"\n```\n{judge.text_table(*table)}\n```\n" for table in tables)
        judge.write_text(RESULTS, f"{kept}\n\n## {seeds} seeds of the demo\n{told}")


def run_stages(out, quick, seed):
    """Run every command that is not done yet, and all after it: [(stage, what it told as HTML)]."""
    os.makedirs(out, exist_ok=True)
    todo, told, stale = list(commands(out, quick, seed)), [], False
    files = [Path(out, f"command_{n:02d}.txt") for n, _ in enumerate(todo, 1)]
    for n, (file, (stage, argv)) in enumerate(zip(files, todo), 1):
        command = shlex.join(["python", "repsae.py", *argv])
        made = argv[argv.index("--out" if "--out" in argv else "--json") + 1]
        stale |= not os.path.exists(made) or not text_of(file).startswith(f"{command}\n")
        if stale:
            for later in files[n:]:                          # nor is it done for a later call
                later.unlink(missing_ok=True)
            repsae.say(f"== {stage['name']}: {command}")
            run_command(argv, command, file)
        links = [f'<p><a href="{os.path.relpath(page, out)}">{page}</a></p>'
                 for page in (f"{made}/report.html", f"{made}/sheet.png") if os.path.exists(page)]
        about = f"<p>{html.escape(stage['about'])}</p><pre>{html.escape(text_of(file))}</pre>"
        told.append((stage["name"], about + "".join(links)))
    return told


def run_command(argv, command, file):
    """Run a command and keep what it prints in a file, or resume it: then the file has it alone."""
    takes, printed = repsae.COMMANDS[argv[0]].flags, io.StringIO()
    again = "resume" if "resume" in takes and text_of(file) == command else "overwrite"
    judge.write_text(file, command)
    try:
        with contextlib.redirect_stdout(printed):
            run, flags = repsae.parse([*argv, *[f"--{again}"] * (again in takes)])
            run(flags)
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
