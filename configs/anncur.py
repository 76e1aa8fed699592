"""ANNCUR: does a CUR factorisation of a cross-encoder's scores find its neighbours better than retrieve-and-rerank?

Yadav et al., EMNLP 2022, arXiv 2210.12579 (ADACUR is its follow-up): for k > 10 better recall at equal cross-encoder
calls than reranking a dual encoder's or TF-IDF's items; at k = 1 the dual encoder stays ahead. Its BERT encoders and
entity-linking data are not here: encoders are trained from scratch, and methods are compared at equal calls.

  python -m experiments.run --config=configs/anncur.py:gpu --workdir=runs/anncur

Docstrings of the Python standard library against 2000 functions, one H100 (186 s, 2026-11-26; cpu, 1000 functions,
277 s on two cores). At 200 calls, with students of 100 steps (now: until dev queries gain nothing), it printed:

  recall of the 50 nearest                ANNCUR 0.945, ADACUR 0.987; fixed anchors 0.83, dual encoder 0.31, TF-IDF 0.12
  recall of the nearest at 100 calls      ANNCUR 0.928; ADACUR removes 78 % of the misses (paper: up to 70 %)
  dual encoder ahead at k = 1             no: 0.380 against 1.000
  bare pseudo-inverse over ridge          22 times the error, as many anchor items as queries
  a query against 100,000 items           376 times as fast as scoring all, 1.4 as reranking

WordNet as entity linking: --config.data.name=wordnet --config.data.path=/usr/share/wordnet. More is in docs/log.md.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="ANNCUR, nearest neighbours by a CUR factorisation",
  family="tensors",
  link="https://arxiv.org/abs/2210.12579",
  does="finds the neighbours that a costly scorer would rank first from its scores of a few anchors",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, minutes), paper (WordNet as entity linking)."""
  pick = scales.picker(scale)
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
        vocabulary=pick(test=400, cpu=2048, gpu=8192),
        query_tokens=pick(test=10, cpu=12, gpu=32, paper=48),
        item_tokens=pick(test=14, cpu=24, gpu=48),
      ),
      # Of the searched world: items, and queries that are anchors, choose the split, and are tested.
      domain=dict(
        size=pick(test=100, cpu=1000, gpu=2000, paper=13_767),
        anchor_queries=pick(test=20, cpu=100, gpu=300, paper=500),
        dev_queries=pick(test=10, cpu=50, gpu=100, paper=250),
        test_queries=pick(test=10, cpu=75, gpu=150, paper=250),
        train=pick(cpu=5000, gpu=20_000, paper=50_000),  # training queries of the other worlds at most
      ),
      shape=dict(
        depth=pick(test=1, cpu=2, gpu=4, paper=6),
        width=pick(test=16, cpu=64, gpu=384),
        q_heads=pick(test=2, cpu=4, gpu=6),
        kv_heads=pick(test=2, cpu=4, gpu=6),
        head_dim=pick(test=8, cpu=16, gpu=64),
        mlp_width=pick(test=32, cpu=128, gpu=1024),
      ),
      # A dual encoder with negatives of its batch stands in for BERT: every encoder below starts from it.
      pretrain=dict(
        epochs=1,
        steps=pick(test=4, cpu=300, gpu=300, paper=2000),
        batch=pick(test=8, cpu=64, gpu=256),
        candidates=2,
        rate=pick(cpu=3e-3, gpu=6e-4),
      ),
      # The CLS head starts without a meaning and takes longer to leave the plateau.
      cross=dict(
        epochs=1,
        steps=dict(emb=pick(test=4, cpu=200, gpu=300, paper=2200), cls=pick(test=4, cpu=400, gpu=600, paper=4400)),
        rate=dict(emb=pick(cpu=1e-3, gpu=3e-4), cls=pick(cpu=3e-3, gpu=6e-4)),
        batch=pick(test=4, cpu=16, gpu=64),
        candidates=pick(test=4, cpu=8, gpu=16),
      ),
      dual=dict(
        epochs=pick(test=1, cpu=2),
        steps=pick(test=4, cpu=60, gpu=100, paper=500),
        batch=pick(test=8, cpu=64, gpu=256),
        candidates=2,
        rate=pick(cpu=1e-3, gpu=3e-4),
        mined=pick(test=8, cpu=64),
      ),
      # Rounds of `steps` until `patience` of them bring nothing on the dev queries, for each rate.
      distil=dict(
        rounds=pick(test=2, cpu=40),
        patience=pick(test=1, cpu=2),
        steps=pick(test=2, cpu=40, gpu=50, paper=100),
        batch=pick(test=4, cpu=8, gpu=16),
        top=pick(test=9, cpu=24, gpu=64),
        shared=dict(  # random items that all queries of a batch share
          steps=pick(test=2, cpu=80, gpu=100),
          batch=pick(test=8, cpu=64, gpu=256),
          size=pick(test=16, cpu=128, gpu=512),
        ),
        rates=pick(cpu=(1e-3,), gpu=(3e-4, 1e-3)),  # cpu: 3e-3 reaches less
      ),
      dtype=pick(cpu="float32", gpu="bfloat16"),  # of the encoders' products; scores are float32
      tile=pick(cpu=256, gpu=8192),  # pairs the cross-encoder scores at once
      hard=pick(test=8, cpu=16, gpu=32),  # hard negatives a training query
      search=dict(
        ks=pick(test=(1, 5), cpu=(1, 10, 20), gpu=(1, 10, 20, 50), paper=(1, 10, 50, 100)),
        claimed=pick(test=(5,), cpu=(10, 20), gpu=(20, 50), paper=(50, 100)),  # k > 10 in the paper
        # 1, 2, 5 and 10 % of all items (paper: from 0.4 %); the fewer, the harder.
        budgets=pick(test=(20, 40), cpu=(10, 20, 50, 100), gpu=(20, 40, 100, 200), paper=(50, 100, 200, 500, 1000)),
        budget=pick(test=40, cpu=100, gpu=200, paper=500),  # of the claims
        shares=pick(test=(0.4,), cpu=(0.4, 0.7), gpu=(0.25, 0.5)),  # of the budget that are anchor items
        seeds=pick(test=1, cpu=5),
        strength=0.01,  # ridge, over s_1^2 / min(k_q, k_i)
        rounds=4,
      ),
      errors=dict(
        anchors=pick(
          test=(20,),
          cpu=(50, 100, 200),
          gpu=(50, 100, 200, 300, 600, 1000),
          paper=(50, 100, 200, 400, 500, 600, 1000, 2000),
        ),
        seeds=pick(cpu=1, gpu=3),
      ),
      bench=dict(
        sizes=pick(test=(50,), cpu=(100, 1000, 10_000), gpu=(100, 3000, 100_000)),
        anchors=pick(cpu=10, gpu=50),
        retrieve=pick(cpu=10, gpu=50),
        repetitions=pick(test=1, cpu=3, gpu=5),
      ),
    )
  )
