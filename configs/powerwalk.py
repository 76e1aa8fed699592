r"""PowerWalk: how few exact steps turn coarse random-walk fingerprints into good personalised PageRank, and how fast?

Paper (CIKM 2016, arXiv 1608.06054): tens of thousands of queries on billion-edge graphs in seconds on a cluster, more
accurate than the stored fingerprints.

  python -m experiments.run --config=configs/powerwalk.py:cpu --workdir=runs/powerwalk \
      --config.data.name=edge_list --config.data.path=wiki-Vote.txt \
      --config.undirected.name=edge_list --config.undirected.path=ego_facebook.txt

printed on two cores (3 min 29 s, 2026-11-26):

  RAG@100 of two steps less that of the fingerprint alone, R = 10, least over graphs       0.332     >= 0     yes
  ends of walks needed for the L1 of one full path, undirected graph                       6.275 x   >= 3     yes
  queries a second, batched over one by one                                                15.07 x   >= 10    yes
  passes over the edges to RAG 0.99, online only over index + steps, least over graphs     1.667 x   >= 3     no
  queries a second at equal RAG, index over the faster power iteration (our own)           0.8344 x  >= 1     no
  the same, top 100 of 256 queries on 999,623 edges                                        0.6411 x  >= 1     no
  256 queries on 999,623 edges                                                             0.8532 s  <= 10    yes
  slope of log seconds against log edges, answering                                        0.956     <= 1.15  yes

The fourth and the two after it fail because RAG@100 is lenient. On wiki-Vote eight steps without an index reach it, and
power iteration that starts from the source, whose flow keeps its place (S + F), needs five; the index saves one of
those and then costs about a step to read. Against an online-only rival that throws its flow away the fifth claim was
1.222: that rival was too weak. In L1 the index is worth more: 0.29 after two steps, where power iteration has 0.53.
Without data.name it runs on generated graphs.

  XLA_FLAGS=--xla_gpu_enable_command_buffer=FUSION python -m experiments.run --config=configs/powerwalk.py:gpu \
      --config.data.name=edge_list --config.data.path=wiki-Vote.txt \
      --config.undirected.name=edge_list --config.undirected.path=ego_facebook.txt --workdir=runs/powerwalk

The flag is for experiments whose programs run side by side in threads, get temporary buffers at new addresses, and
whose CUDA graphs with products of cuBLAS in them then refuse to be rewritten; this one has no such threads and was run
with it all the same. It asks 10,000 queries of R-MAT graphs of up to 10.2 M edges and printed, on one H100 (104 s over
all parts, 2026-11-26):

  RAG@100 of two steps less that of the fingerprint alone, R = 10, least over graphs       0.3229    >= 0     yes
  ends of walks needed for the L1 of one full path, undirected graph                       6.138 x   >= 3     yes
  queries a second, batched over one by one                                                115.7 x   >= 10    yes
  passes over the edges to RAG 0.99, online only over index + steps, least over graphs     1.25 x    >= 3     no
  queries a second at equal RAG, index over the faster power iteration (our own)           0.7962 x  >= 1     no
  the same, top 100 of 10,000 queries on 10,171,077 edges                                  0.8137 x  >= 1     no
  10,000 queries on 10,171,077 edges                                                       2.795 s   <= 10    yes
  slope of log seconds against log edges, answering                                        0.5167    <= 1.15  yes

The three that fail do so for the reason above: power iteration from the source reaches RAG 0.99 in 4 passes on
wiki-Vote and on the largest graph, where the index saves one and then costs more than that to read; on ego-Facebook it
takes 3 passes and the index of R = 10 4. R = 1000 saves two of them on either; its index is 31 and 14 times larger, and
was not timed.
The slope holds because small graphs do not fill the GPU: 0.059 s at 8,125 edges, 0.044 at 147,974, 0.145 at 1,239,173,
2.795 at 10,171,077. Over the two largest it is 1.40, which would not hold, and 1.58 for power iteration: 8.2 times the
edges, and 8 times the rows of a batch, took 19 times as long. Why was not looked into. Building the index is linear
(0.90; 1.00 at the end).

Memory, counted for a batch of 256 at n = 2^20: both orders of the edges 0.2 GB; an index of 23.6 M entries 0.2 GB; S,
F, F P and the estimate 1.1 GB each, (n, 256) of float32; 2 GiB of messages a chunk; 2^26 visits at a time while
walking, 0.9 GB and half as much again to sort their keys. About 9 GB in all. The accuracy parts have no seconds in them
and need no GPU; each part of a run is kept in its folder, and a run goes on with what is missing.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="PowerWalk, personalised PageRank from fingerprints",
  family="graphs",
  link="https://arxiv.org/abs/1608.06054",
  does="answers personalised PageRank from coarse random-walk fingerprints and a few exact steps",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (10,000 queries on 10 M edges), paper (100 M edges)."""
  pick = scales.picker(scale)
  graph = dict(path="", nodes=pick(test=64, cpu=2048, gpu=8192), degree=pick(test=4.0, cpu=12.0), mixing=0.2, blocks=16)
  return ml_collections.ConfigDict(
    dict(
      paper="powerwalk",
      experiment="powerwalk",
      scale=scale,
      seed=0,
      # Names: edge_list with a path, rmat, sbm, barabasi_albert, karate, les_miserables, florentine.
      data=dict(name=pick(test="karate", cpu="rmat"), directed=True, **graph),
      undirected=dict(name=pick(test="karate", cpu="sbm"), directed=False, **graph),
      accuracy=dict(
        sources=pick(test=8, cpu=64, gpu=100),
        k=pick(test=5, cpu=100),
        walks=pick(test=(2, 20), cpu=(1, 10, 100), gpu=(1, 10, 100, 1000)),
        main=pick(test=2, cpu=10),  # the R of the claims; one of `walks`
        steps=pick(test=(0, 1, 2), cpu=(0, 1, 2, 4, 8), gpu=(0, 1, 2, 3, 4, 5, 6, 7, 8)),
        seeds=pick(test=1, cpu=2, gpu=5, paper=5),
        length=64,
        cap=1024,
        rag=0.99,
        most_steps=pick(test=12, cpu=40),  # how far online-only steps are followed
        eps=pick(test=(1e-3,), cpu=(1e-6, 1e-5, 1e-4, 1e-3)),
        end_point_factors=pick(test=(1, 4), cpu=(1, 2, 3, 6, 12)),
      ),
      bench=dict(repetitions=pick(test=2, cpu=5), batch=pick(test=8, cpu=256, paper=128), steps=2),
      scaling=dict(
        nodes=pick(
          test=(64, 128),
          cpu=(2**11, 2**13, 2**15, 2**17),
          gpu=(2**10, 2**14, 2**17, 2**20),
          paper=(2**20, 2**23),
        ),
        degree=pick(test=4.0, cpu=8.0, gpu=10.0, paper=16.0),
        walks=pick(test=2, cpu=4, gpu=10, paper=10),
        queries=pick(test=16, cpu=256, gpu=10_000, paper=10_000),
        steps=2,
        length=32,
        sample=pick(test=8, cpu=32, gpu=64),  # queries that tell how many steps reach the RAG
        exact=pick(test=60, cpu=60, gpu=100),  # iterations of their truth
        scipy=pick(test=8, cpu=32),  # queries scipy answers
        repetitions=pick(test=1, cpu=2),
      ),
    )
  )
