r"""ANNCUR: does a CUR factorisation of a cross-encoder's scores find its neighbours better than retrieve-and-rerank?

Paper (arXiv 2210.12579; ADACUR is its follow-up), in words: for k > 10 better recall at equal cross-encoder calls than
reranking a dual encoder's or TF-IDF's items; at k = 1 the dual encoder stays ahead; EMB-CE is approximated better than
CLS-CE. Its BERT encoders and entity-linking data are not here: both encoders are trained from scratch, and what is
compared is the ranking of methods at equal calls. ADACUR: up to 70 % less recall error at k = 1.

  python -m experiments.run --config=configs/anncur.py:cpu --workdir=runs/anncur

Docstrings of the Python standard library against 1000 functions; 100 anchor queries, 50 choose the split, 75 are
tested, 5 draws of anchor items. On two shared CPU cores (209 s, load average 4) it printed:

  recall@20 at C = 100 calls        ANNCUR 0.958, ADACUR 0.988; DE_base 0.695, TF-IDF 0.183, mean score 0.311
  recall@10 at C = 100              ANNCUR 0.984; DE_base 0.740
  recall@1 at C = 40                ANNCUR 0.933; ADACUR removes 68 % of the error
  error at k_i = k_q, bare inverse  3.3 times that of ridge
  a query against 30,000 items      1029 times faster than scoring all, 1.3 times than reranking (equal calls)

Not reproduced there: DE_base ahead at k = 1 (0.720 against 0.989; at C = 40 0.613 against 0.933); EMB-CE approximated
better than CLS-CE (its matrix has twice the effective rank, 31 against 15, and the encoders are about as accurate:
0.23 and 0.20 of 16 candidates, chance 0.06). The product e E and its top 10 alone are a little slower than in NumPy.

WordNet as entity linking (the files of Debian's wordnet-base), verbs searched:

  python -m experiments.run --config=configs/anncur.py:cpu --workdir=runs/anncur_wordnet \
      --config.data.name=wordnet --config.data.path=/usr/share/wordnet

printed, in 6 min on the same cores:

  accuracy of EMB-CE, CLS-CE        0.67, 0.42 of 16 candidates; 0.40, 0.41 among the lemma's synsets (first sense 0.39)
  recall@20 at C = 100              ANNCUR 0.929, ADACUR 0.986; DE_base 0.827, TF-IDF 0.129, mean score 0.447
  recall@1 at C = 40                ANNCUR 0.811, ADACUR 0.875; DE_base 0.933: the paper's reversal, gone at C = 100
  error at k_i = k_q, bare inverse  7.5 times that of ridge

Scale h200 (4 layers, 2000 functions) and paper (6 layers, all 13,767 verbs) have not been run.
"""

import ml_collections


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), h200 (one GPU, minutes), paper (WordNet as entity linking)."""
  pick = lambda **by_scale: by_scale.get(scale, by_scale.get("h200" if scale == "paper" else "cpu", by_scale["cpu"]))
  return ml_collections.ConfigDict(
    dict(
      paper="anncur",
      experiment="anncur",
      scale=scale,
      seed=0,
      data=dict(
        name=pick(cpu="stdlib_code", paper="wordnet"),  # or local_text with a path, or a tfds name
        path=pick(cpu="", paper="/usr/share/wordnet"),
        split=pick(test="validation", cpu="train"),
        pairs="functions",  # of Python source; sentences: of prose (WordNet has its own)
        world="verb",  # WordNet: the part of speech that is searched
        vocabulary=pick(test=400, cpu=2048, h200=8192),
        query_tokens=pick(test=10, cpu=12, h200=32, paper=48),
        item_tokens=pick(test=14, cpu=24, h200=48),
      ),
      # Of the searched world: items, and queries that are anchors, choose the split, and are tested.
      domain=dict(
        size=pick(test=100, cpu=1000, h200=2000, paper=13_767),
        anchor_queries=pick(test=20, cpu=100, h200=300, paper=500),
        dev_queries=pick(test=10, cpu=50, h200=100, paper=250),
        test_queries=pick(test=10, cpu=75, h200=150, paper=250),
        train=pick(cpu=5000, h200=20_000, paper=50_000),  # training queries of the other worlds at most
      ),
      shape=dict(
        depth=pick(test=1, cpu=2, h200=4, paper=6),
        width=pick(test=16, cpu=64, h200=384),
        q_heads=pick(test=2, cpu=4, h200=6),
        kv_heads=pick(test=2, cpu=4, h200=6),
        head_dim=pick(test=8, cpu=16, h200=64),
        mlp_width=pick(test=32, cpu=128, h200=1024),
      ),
      # A dual encoder with negatives of its batch stands in for BERT: every encoder below starts from it.
      pretrain=dict(
        epochs=1,
        steps=pick(test=4, cpu=300, h200=300, paper=2000),
        batch=pick(test=8, cpu=64, h200=256),
        candidates=2,
        rate=pick(cpu=3e-3, h200=6e-4),
      ),
      # The CLS head starts without a meaning and takes longer to leave the plateau.
      cross=dict(
        epochs=1,
        steps=dict(emb=pick(test=4, cpu=200, h200=300, paper=2200), cls=pick(test=4, cpu=400, h200=600, paper=4400)),
        rate=dict(emb=pick(cpu=1e-3, h200=3e-4), cls=pick(cpu=3e-3, h200=6e-4)),
        batch=pick(test=4, cpu=16, h200=64),
        candidates=pick(test=4, cpu=8, h200=16),
      ),
      dual=dict(
        epochs=pick(test=1, cpu=2),
        steps=pick(test=4, cpu=60, h200=100, paper=500),
        batch=pick(test=8, cpu=64, h200=256),
        candidates=2,
        rate=pick(cpu=1e-3, h200=3e-4),
        mined=pick(test=8, cpu=64),
      ),
      distil=dict(
        epochs=1,
        steps=pick(test=2, cpu=40, h200=100, paper=200),
        batch=pick(test=4, cpu=16, h200=32, paper=64),
        top=pick(test=9, cpu=24, h200=64),
        rate=pick(cpu=1e-3, h200=3e-4),
      ),
      dtype=pick(cpu="float32", h200="bfloat16"),  # of the encoders' products; scores are float32
      tile=pick(cpu=256, h200=8192),  # pairs the cross-encoder scores at once
      hard=pick(test=8, cpu=16, h200=32),  # hard negatives a training query
      search=dict(
        ks=pick(test=(1, 5), cpu=(1, 10, 20), h200=(1, 10, 20, 50), paper=(1, 10, 50, 100)),
        claimed=pick(test=(5,), cpu=(10, 20), h200=(20, 50), paper=(50, 100)),  # k > 10 in the paper
        budgets=pick(test=(40,), cpu=(40, 100, 200), h200=(100, 200), paper=(100, 200, 500, 1000)),
        budget=pick(test=40, cpu=100, h200=200, paper=500),  # of the claims
        shares=pick(test=(0.4,), cpu=(0.4, 0.7), h200=(0.2, 0.4, 0.6, 0.8)),  # of the budget that are anchor items
        seeds=pick(test=1, cpu=5),
        strength=0.01,  # ridge, over s_1^2 / min(k_q, k_i)
        rounds=4,
      ),
      errors=dict(
        anchors=pick(
          test=(20,),
          cpu=(25, 50, 100, 200, 500),
          h200=(50, 100, 200, 300, 600, 1000),
          paper=(50, 100, 200, 400, 500, 600, 1000, 2000),
        ),
        seeds=pick(cpu=1, h200=3),
      ),
      bench=dict(
        sizes=pick(test=(50,), cpu=(30, 300, 3000, 30_000), h200=(100, 3000, 100_000)),
        anchors=pick(cpu=10, h200=50),
        retrieve=pick(cpu=10, h200=50),
        repetitions=pick(test=1, cpu=3, h200=5),
      ),
    )
  )
