#!/usr/bin/env bash
# A real Slurm on this machine, everything under $1: two nodes, n0 and n1, which are both this host. Needs root, slurm-wlm
# and munge. Prints nothing; $1/slurm.conf is what SLURM_CONF must name, and $1/down.sh ends it.
set -euo pipefail
D=$1
mkdir -p "$D"/{run,log,state}
chmod 755 "$D" "$D/run"
port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }
(umask 077; head -c 1024 /dev/urandom > "$D/munge.key")
munged --force --key-file="$D/munge.key" --socket="$D/run/munge.sock" --pid-file="$D/run/munged.pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/run/munge.seed"
host=$(hostname -s)
memory=$(awk '/MemTotal/{print int($2/1024*0.45)}' /proc/meminfo)
cat > "$D/slurm.conf" <<C
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$D/run/munge.sock
CredType=cred/munge
SlurmctldPort=$(port)
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool-%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
NodeName=n0 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(port) CPUs=2 RealMemory=$memory State=UNKNOWN
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(port) CPUs=2 RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
C
export SLURM_CONF=$D/slurm.conf
cat > "$D/down.sh" <<C
export SLURM_CONF=$D/slurm.conf
scontrol shutdown 2>/dev/null
sleep 1
for file in $D/run/*.pid; do kill "\$(cat "\$file")" 2>/dev/null; done
for steps in \$(pgrep slurmstepd); do # what was still ending
    [[ \$(readlink /proc/\$steps/cwd) == $D/* ]] && kill -9 \$steps
done
true
C
slurmctld -c
slurmd -N n0 -c
slurmd -N n1 -c
for _ in $(seq 50); do
    sinfo -h -o '%t %D' | grep -q '^idle 2' && exit
    sleep 0.2
done
echo "its nodes do not come up: see $D/log" >&2
exit 1
