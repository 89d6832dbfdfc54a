"""What goes wrong by itself, done on purpose; docs/reference/faults.md has the outcomes, and test_page.py compares.

Here: kills, Ctrl-C and time limits of whole runs (test_kills.py), disks and folders (test_disks.py), damage
(test_damage.py), two runs and clocks (test_runs.py), devices, memory, upgrades (test_machines.py), pods that are lost
(test_pods.py). Other faults are tested where the code is; that page names the tests.
"""
