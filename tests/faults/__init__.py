"""What goes wrong by itself, done on purpose; docs/reference/faults.md has the outcomes.

Here: kills, Ctrl-C and time limits of whole runs (test_kills.py), disks and folders (test_disks.py), damage
(test_damage.py), two runs and clocks (test_runs.py), devices, memory, upgrades (test_machines.py).

Not repeated here, since they are tested where the code is:

    interrupted downloads, wrong checksums, a full disk there   tests/unit/test_fetch_faults.py
    damaged archives, zips, tars, parquet shards                tests/unit/test_members.py, test_zips.py,
                                                                tests/unit/test_containers.py
    unreadable images, fail or mask                             tests/unit/test_pixel_cache.py, test_embed.py
    a killed worker, a killed pixel job                         tests/unit/test_pixel_cache.py
    a full disk in the middle of a shard or a cache             tests/unit/test_embed.py, test_pixel_cache.py
    one shard is lost by a kill: embed, attack, match, ask      tests/unit/test_embed.py, test_attack_job.py,
                                                                test_correspondence.py, test_lmm.py
    a batch that does not fit the memory                        tests/unit/test_embed.py, test_heads.py, test_attacks.py
    features, logits, gradients that are not finite             tests/unit/test_embed.py, test_attacks.py,
                                                                tests/unit/test_metric_oracles.py, test_retrieval.py
    a job that dies with a GPU leased, four jobs on two GPUs    tests/unit/test_lease.py
    manifests that do not belong together                       tests/unit/test_metric_oracles.py, test_pixel_cache.py
    configs and tables with faults                              tests/unit/test_registry.py
"""
