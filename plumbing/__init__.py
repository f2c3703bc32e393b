"""What a run needs beside the paper. Nothing in here imports a component or a script.

command_line  flags from recipe tables; errors in one line with exit status 2
processes     torchrun, mixed precision, DistributedDataParallel, sums over processes
memory        what a run needs at least, against what there is
signals       SIGTERM and SIGINT: save, then stop
noise         random numbers that depend on (seed, step, sample) and not on history
schedules     learning rates, temperature and KL weight as functions of the step
run           one training run around its loop: resume, save, evaluate, log, stop
outputs       where --out may lie; files that are whole or not there
checkpoints   the --out folder: its lock, its checkpoints, --resume
weights       files of weights, read without running code in them
entries       what a checkpoint holds, checked entry by entry
backbone      the backbone in a file of weights: its configuration and shapes
published     weights under the names that others publish them under
log           metrics.jsonl and progress on the terminal
pictures      PNG and SVG
advice        what an evaluation's numbers say about a run that goes wrong
clock         --benchmark: where the time of a step goes
"""
