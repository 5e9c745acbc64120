#!/bin/bash
# A private, real Slurm on this host: slurmctld and several slurmd, for development, tests and a first look.
#
#   scripts/virtual_cluster.sh start|stop|status|env [--dir D] [--nodes N] [--port P] [--accounting]
#
#   start    brings up every daemon that is not running; twice does nothing. Job ids go on where they were.
#   stop     cancels the cluster's jobs and ends its daemons; the folder (state, logs) stays
#   status   one line a daemon; exit code 0: all run, 3: none runs, 1: some run
#   env      shell lines that point Slurm's commands at this cluster:  eval "$(scripts/virtual_cluster.sh env)"
#
#   --dir D        folder of the cluster, on a local disk      (/tmp/poise-slurm-UID)
#   --nodes N      nodes of 8 CPUs, 32 GB and, where /dev/tty10 to 13 exist, 4 GPUs: all pretended  (4)
#   --port P       first of N + 3 ports below 20000            (the first free block)
#   --accounting   also slurmdbd on its own MariaDB, so that `sacct` works
#
# Partitions: main; low (preempted by the others: user signal, 20 s grace, requeue); high.
# Needs neither root nor systemd nor cgroups, and installs nothing. Everything listens on the loopback (slurmdbd: on all
# interfaces) and trusts only this cluster's own munge key, which lies in a folder that only its owner can enter.
# Not covered: real GPUs, memory limits (no cgroups), several users, more than one host.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

die() { printf 'virtual_cluster: %s\n' "$*" >&2; exit 2; }
usage() { sed -n '4s/^# *//p' "$0" >&2; exit 2; }

dir=${TMPDIR:-/tmp}/poise-slurm-$(id -u) nodes=4 port='' accounting=''
[ $# -gt 0 ] || usage
command=$1; shift
while [ $# -gt 0 ]; do
  case $1 in
    --dir) dir=${2:?--dir needs a folder}; shift 2 ;;
    --nodes) nodes=${2:?--nodes needs a number}; shift 2 ;;
    --port) port=${2:?--port needs a number}; shift 2 ;;
    --accounting) accounting=yes; shift ;;
    *) usage ;;
  esac
done
between() { [[ $1 =~ ^[0-9]{1,5}$ ]] && ((10#$1 >= $2 && 10#$1 <= $3)); }
between "$nodes" 1 64 || die "--nodes: 1 to 64 wanted, got '$nodes'"
[ -z "$port" ] || between "$port" 1024 $((19997 - nodes)) || die "--port: 1024 to $((19997 - nodes)) wanted, got '$port'"
dir=$(realpath -ms "$dir")
# slurmd's sockets are DIR/spool/NODE/NODE_JOB.STEP, and a socket's path has at most 107 characters.
((${#dir} <= 64)) || die "--dir: at most 64 characters wanted (sockets lie below it), got ${#dir}: $dir"
[[ $dir != *[\"\'\\,\#%$'\n']* ]] || die "--dir: quotes, commas, #, % and backslashes do not work in slurm.conf: $dir"
[ -z "$accounting" ] || [[ $dir != *\ * ]] || die "--dir: MariaDB, for --accounting, does not work below a folder with spaces: $dir"
conf=$dir/slurm.conf

# --- processes: a pid file counts only if that process is alive and was started for this configuration ----------------

for_us() { grep -szqxF "SLURM_CONF=$conf" "/proc/$1/environ"; }

alive() {  # alive NAME   (a zombie has no environment: it does not count)
  local pid
  { read -r pid <"$dir/run/$1.pid"; } 2>/dev/null && for_us "$pid"
}

stop_daemon() {  # stop_daemon NAME
  local pid
  alive "$1" || return 0
  pid=$(<"$dir/run/$1.pid")  # now: slurmctld removes the file before it ends
  kill "$pid"
  wait_until 10 gone "$pid" || kill -9 "$pid"  # slurmctld waits for answers of lost nodes
  wait_until 5 gone "$pid"
}
gone() { ! for_us "$1"; }

wait_until() {  # wait_until SECONDS COMMAND...   by the clock: on a busy machine a look itself takes long
  local end=$((SECONDS + $1 + 1)); shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || return 1; sleep 0.05; done
}

daemons() {  # names of the daemons of the cluster as it is configured, in starting order
  echo munged
  [ ! -e "$dir/slurmdbd.conf" ] || printf '%s\n' mariadbd slurmdbd
  echo slurmctld
  sed -n 's/^NodeName=\([^ ]*\).*/slurmd.\1/p' "$conf"
}

step_processes() {  # slurmstepd's of this cluster, which outlive a killed slurmd, and all that they started
  local pid
  for pid in $(pgrep -x slurmstepd); do
    if for_us "$pid"; then tree "$pid"; fi
  done
}

tree() {  # a process and everything below it, leaves first
  local child
  for child in $(pgrep -P "$1"); do tree "$child"; done
  echo "$1"
}

# --- configuration ---------------------------------------------------------------------------------------------------

listening() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

free_ports() {  # first port of a free block; where the search starts depends on the folder, so that two clusters differ
  local block=$((nodes + 3)) start tried p base
  start=$(($(cksum <<<"$dir" | cut -d' ' -f1) % 80))
  for ((tried = 0; tried < 80; tried++)); do
    base=$((11000 + (start + tried) % 80 * 100))
    for ((p = base; p < base + block; p++)); do ! listening "$p" || continue 2; done
    echo "$base"; return
  done
  die "no $block free ports between 11000 and 19000; name some with --port"
}

configure() {
  local host user gpus='' i
  host=$(hostname -s) user=$(id -un)
  # A pretended GPU is any numbered device file: slurmd looks whether it exists, nobody opens it.
  [ ! -c /dev/tty13 ] || gpus=yes
  [ -n "$port" ] || port=$(free_ports)
  # Ports stay below 20000: jobs take theirs from 20000 up, and all "nodes" share one network.
  # Nodes are named as loopback addresses, which resolve everywhere: a node's name is a job's MASTER_ADDR.
  # cred_expire is the delay before a requeued job starts again; it must be at least KillWait + 5.
  # FirstJobId: results of an earlier cluster in a job folder must not look like results of this one.
  cat >"$conf" <<C
ClusterName=virtual
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo="socket=$dir/run/munge.socket,cred_expire=8"
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation="$dir/state"
SlurmdSpoolDir="$dir/spool/%n"
SlurmctldPidFile="$dir/run/slurmctld.pid"
SlurmdPidFile="$dir/run/slurmd.%n.pid"
SlurmctldLogFile="$dir/log/slurmctld.log"
SlurmdLogFile="$dir/log/slurmd.%n.log"
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
DefMemPerCPU=4000
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=3
JobRequeue=1
MinJobAge=864000
MaxJobCount=20000
FirstJobId=$(($(date +%s) % 60000000 + 1))
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=1,bf_continue
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=100 PreemptMode=OFF
C
  for ((i = 1; i <= nodes; i++)); do
    mkdir -p "$dir/spool/127.0.1.$i"
    echo "NodeName=127.0.1.$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2 + i)) CPUs=8 RealMemory=32000${gpus:+ Gres=gpu:4}"
  done >>"$conf"
  printf 'AutoDetect=off\n%s\n' "${gpus:+Name=gpu File=/dev/tty[10-13]}" >"$dir/gres.conf"
  echo 'CgroupPlugin=cgroup/v1' >"$dir/cgroup.conf"  # slurmd 22.05 wants to know, and uses none
  rm -f "$dir/slurmdbd.conf"
  if [ -z "$accounting" ]; then
    printf 'AccountingStorageType=accounting_storage/none\nJobAcctGatherType=jobacct_gather/none\n' >>"$conf"
    return
  fi
  cat >>"$conf" <<C
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass="$dir/run/munge.socket"
JobAcctGatherType=jobacct_gather/linux
C
  (umask 077; cat >"$dir/slurmdbd.conf" <<C
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=$user
AuthType=auth/munge
AuthInfo="socket=$dir/run/munge.socket"
PidFile="$dir/run/slurmdbd.pid"
LogFile="$dir/log/slurmdbd.log"
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
C
  )
}

# --- daemons ---------------------------------------------------------------------------------------------------------

# Daemons get a bare environment: this script may itself run inside a job of another Slurm.
# MYSQL_UNIX_PORT: MariaDB has no network, slurmdbd finds it by its socket.
launch() {
  env -i PATH="$PATH" HOME="$HOME" SLURM_CONF="$conf" MYSQL_UNIX_PORT="$dir/run/mariadb.socket" "$@" \
    </dev/null >>"$dir/log/${1##*/}.start.log" 2>&1 9>&-
}

start_daemon() {
  case $1 in
    munged)  # --force: it would rather have a socket that every user can reach
      [ -s "$dir/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$dir/munge.key")
      launch munged --force --key-file="$dir/munge.key" --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" --num-threads=2 ;;
    mariadbd)
      [ -d "$dir/db/mysql" ] || launch mariadb-install-db --no-defaults --datadir="$dir/db" --user="$(id -un)" \
        --auth-root-authentication-method=normal --skip-test-db || return 1
      launch mariadbd --no-defaults --user="$(id -un)" --datadir="$dir/db" --socket="$dir/run/mariadb.socket" --skip-networking \
        --pid-file="$dir/run/mariadbd.pid" --innodb-buffer-pool-size=64M --innodb-log-file-size=16M \
        --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --performance-schema=OFF --skip-log-bin >/dev/null 2>&1 9>&- &
      wait_until 30 mariadb-admin --no-defaults -uroot -S "$dir/run/mariadb.socket" ping ;;
    slurmdbd)
      launch slurmdbd
      wait_until 60 listening "$(sed -n 's/^DbdPort=//p' "$dir/slurmdbd.conf")"
      sacctmgr -n -P list cluster format=cluster | grep -qx virtual || sacctmgr -i add cluster virtual >/dev/null ;;
    slurmctld) launch slurmctld -f "$conf" ;;
    slurmd.*) launch slurmd -f "$conf" -N "${1#slurmd.}" ;;
  esac
}

# --- commands --------------------------------------------------------------------------------------------------------

check_programs() {
  local missing=()
  command -v munged >/dev/null || missing+=(munge)
  command -v slurmctld >/dev/null || missing+=(slurmctld)
  command -v slurmd >/dev/null || missing+=(slurmd)
  command -v sbatch >/dev/null || missing+=(slurm-client)
  [ -z "$accounting" ] || { command -v slurmdbd >/dev/null || missing+=(slurmdbd)
                            command -v mariadbd >/dev/null || missing+=(mariadb-server); }
  [ ${#missing[@]} -eq 0 ] || die "not installed: ${missing[*]}. On Debian and Ubuntu (as root):
  apt-get install --no-install-recommends ${missing[*]}"
}

no_jobs() { [ -z "$(squeue -h)" ]; }
# A drained node has answered: whoever drained it, or Slurm's reason, keeps it so.
all_ready() { [ "$(timeout 10 sinfo -h -N -p main -o '%T' | grep -cvE 'down|unk|\*')" -ge "$(grep -c ^NodeName= "$conf")" ]; }

start() {
  check_programs
  mkdir -p "$dir"
  [ -O "$dir" ] || die "$dir belongs to somebody else; name another --dir"
  chmod 700 "$dir"
  exec 9>"$dir/lock"
  flock -w 120 9 || die "another start or stop is at work in $dir"
  mkdir -p "$dir"/{run,log,state,spool}
  local name running=0
  [ ! -e "$conf" ] || for name in $(daemons); do ! alive "$name" || running=$((running + 1)); done
  ((running > 0)) || configure  # what runs keeps its configuration
  for name in $(daemons); do
    alive "$name" || start_daemon "$name" || die "$name did not start; see $dir/log"
  done
  wait_until 60 all_ready || die "some nodes are not ready after 60 s; see \`sinfo -N\` and $dir/log"
  echo "running: $(grep -c ^NodeName= "$conf") nodes, configuration $conf"
}

stop() {
  [ -e "$conf" ] || { echo "not running: no cluster in $dir"; return; }
  exec 9>"$dir/lock"
  flock -w 120 9 || die "another start or stop is at work in $dir"
  local name pid
  if alive slurmctld; then
    scancel --user="$(id -un)" 2>/dev/null || true
    wait_until 8 no_jobs || true
  fi
  for pid in $(step_processes); do kill -9 "$pid" 2>/dev/null || true; done
  for name in $(daemons | tac); do stop_daemon "$name"; done
  for pid in $(step_processes); do kill -9 "$pid" 2>/dev/null || true; done  # started meanwhile
  echo "stopped; $dir can be deleted"
}

status() {
  [ -e "$conf" ] || { echo "not running: no cluster in $dir"; return 3; }
  local name up=0 down=0
  for name in $(daemons); do
    if alive "$name"; then up=$((up + 1)); echo "$name running, process $(<"$dir/run/$name.pid")"
    else down=$((down + 1)); echo "$name not running"; fi
  done
  ((down > 0)) || return 0
  ((up == 0)) && return 3 || return 1
}

export SLURM_CONF=$conf
case $command in
  start | stop | status) "$command" ;;
  env) printf 'export SLURM_CONF=%q\n' "$conf" ;;
  *) usage ;;
esac
