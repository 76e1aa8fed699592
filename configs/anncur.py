r"""ANNCUR: does a CUR factorisation of a cross-encoder's scores find its neighbours better than retrieve-and-rerank?

Paper (arXiv 2210.12579; ADACUR is its follow-up), in words: for k > 10 better recall at equal cross-encoder calls than
reranking a dual encoder's or TF-IDF's items; at k = 1 the dual encoder stays ahead; EMB-CE is approximated better than
CLS-CE. Its BERT encoders and entity-linking data are not here: both encoders are trained from scratch, and what is
compared is the ranking of methods at equal calls. ADACUR: up to 70 % less recall error at k = 1.

  python -m experiments.run --config=configs/anncur.py:cpu --workdir=runs/anncur

Docstrings of the Python standard library against 1000 functions; 100 anchor queries, 50 choose the split, 75 are
tested, 5 draws of anchor items. On two CPU cores without other work (277 s, 2026-11-26) it printed:

  recall@20 at C = 100 calls        ANNCUR 0.934, ADACUR 0.978; DE_base 0.641, TF-IDF 0.161, mean score 0.363
  recall@10 at C = 100              ANNCUR 0.969; DE_base 0.676
  recall@1 at C = 40                ANNCUR 0.920; ADACUR removes 70 % of the error (at C = 100 ANNCUR makes none)
  error at k_i = k_q, bare inverse  3.6 times that of ridge
  a query against 30,000 items      701 times faster than scoring all, 1.17 times than reranking (equal calls)

Not reproduced there: DE_base ahead at k = 1 (0.693 against 1.000; at C = 40 0.507 against 0.920); EMB-CE approximated
better than CLS-CE (its matrix has more than twice the effective rank, 32 against 13). The encoders are about as
accurate, 0.24 and 0.22 of 16 candidates, chance 0.06; but CLS-CE still has 0.16 when it reads another query, EMB-CE
0.06: much of what CLS-CE scores is the item. The product e E and its top 10 alone take as long as in NumPy.

WordNet as entity linking (the files of Debian's wordnet-base), verbs searched:

  python -m experiments.run --config=configs/anncur.py:cpu --workdir=runs/anncur_wordnet \
      --config.data.name=wordnet --config.data.path=/usr/share/wordnet

printed, in 6 min on the same cores:

  accuracy of EMB-CE, CLS-CE        0.67, 0.42 of 16 candidates; 0.40, 0.41 among the lemma's synsets (first sense 0.39)
  recall@20 at C = 100              ANNCUR 0.929, ADACUR 0.986; DE_base 0.827, TF-IDF 0.129, mean score 0.447
  recall@1 at C = 40                ANNCUR 0.811, ADACUR 0.875; DE_base 0.933: the paper's reversal, gone at C = 100
  error at k_i = k_q, bare inverse  7.5 times that of ridge

  XLA_FLAGS="--xla_gpu_enable_command_buffer=FUSION --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" \
      python -m experiments.run --config=configs/anncur.py:gpu --workdir=runs/anncur

The first flag keeps products of cuBLAS out of CUDA graphs: several programs run side by side in threads there, get
temporary buffers at new addresses, and a graph with such products in it refuses to be rewritten. The others make XLA
compile faster, with products it has not tuned: f may be slower than it need be, which is in ANNCUR's favour where all
items are scored. On 4 layers, 2000 functions, 300 anchor and 150 test queries and one H100 (186 s, 2026-11-26):

  recall@50 at C = 200 calls        ANNCUR 0.945, ADACUR 0.987; DE_base 0.310, TF-IDF 0.116, mean score 0.196
  recall@20 at C = 200              ANNCUR 0.975; DE_base 0.326
  recall@1 at C = 100               ANNCUR 0.928; ADACUR removes 78 % of the error (at C = 200 ANNCUR makes none)
  recall@50, EMB-CE less CLS-CE     0.072, the paper's direction
  error at k_i = k_q, bare inverse  22 times that of ridge
  a query against 100,000 items     376 times faster than scoring all [248, 423], 1.41 than reranking (equal calls)
  e E and its top 50 of 100,000     1.94 times faster than NumPy on the host; slower at 3000

11 of 14 hold. Not: accuracy twice that of chance (EMB-CE 0.116, CLS-CE 0.176 of 16 candidates, chance 0.06). The
encoders know their 2051 training queries (last losses 0.40 and 0.07) and little beyond; DE_base and its distilled
forms, trained on the same, are weak rivals. So these figures say how well f's own ranking is found, not how good f is.
Not: DE_base ahead at k = 1 (0.380 against 1.000). Not: a lower relative error for EMB-CE at k_i = 100, 0.095 against
0.084, although its recall is higher: the mean score alone leaves 0.89 of EMB-CE and 0.56 of CLS-CE to be explained.

Scale paper (6 layers, all 13,767 verbs) has not been run.
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
      distil=dict(
        epochs=1,
        steps=pick(test=2, cpu=40, gpu=100, paper=200),
        batch=pick(test=4, cpu=16, gpu=32, paper=64),
        top=pick(test=9, cpu=24, gpu=64),
        rate=pick(cpu=1e-3, gpu=3e-4),
      ),
      dtype=pick(cpu="float32", gpu="bfloat16"),  # of the encoders' products; scores are float32
      tile=pick(cpu=256, gpu=8192),  # pairs the cross-encoder scores at once
      hard=pick(test=8, cpu=16, gpu=32),  # hard negatives a training query
      search=dict(
        ks=pick(test=(1, 5), cpu=(1, 10, 20), gpu=(1, 10, 20, 50), paper=(1, 10, 50, 100)),
        claimed=pick(test=(5,), cpu=(10, 20), gpu=(20, 50), paper=(50, 100)),  # k > 10 in the paper
        budgets=pick(test=(40,), cpu=(40, 100, 200), gpu=(100, 200), paper=(100, 200, 500, 1000)),
        budget=pick(test=40, cpu=100, gpu=200, paper=500),  # of the claims
        shares=pick(test=(0.4,), cpu=(0.4, 0.7), gpu=(0.2, 0.4, 0.6, 0.8)),  # of the budget that are anchor items
        seeds=pick(test=1, cpu=5),
        strength=0.01,  # ridge, over s_1^2 / min(k_q, k_i)
        rounds=4,
      ),
      errors=dict(
        anchors=pick(
          test=(20,),
          cpu=(25, 50, 100, 200, 500),
          gpu=(50, 100, 200, 300, 600, 1000),
          paper=(50, 100, 200, 400, 500, 600, 1000, 2000),
        ),
        seeds=pick(cpu=1, gpu=3),
      ),
      bench=dict(
        sizes=pick(test=(50,), cpu=(30, 300, 3000, 30_000), gpu=(100, 3000, 100_000)),
        anchors=pick(cpu=10, gpu=50),
        retrieve=pick(cpu=10, gpu=50),
        repetitions=pick(test=1, cpu=3, gpu=5),
      ),
    )
  )
