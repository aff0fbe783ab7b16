# What run and beside share. Both set `scratch`, the folder in which each part leaves its log, its summary and what failed.

# A hung test is interrupted, so that pytest still says which one it was.
PART_MAX_S=1800

# Remember that a check failed: what .ci/run ends with.
failed() { echo "$1" >>"$scratch/failed"; }

# A virtual environment in $1 with Python $2 and our extra $3. It byte-compiles what is imported, not all that is there.
make_environment() {
    "$2" -m venv "$1" && "$1/bin/pip" install --quiet --disable-pip-version-check --no-compile -e ".[$3]"
}

# Run pytest with the arguments after the first two, with the Python environment in $2, under the name $1. Leaves pytest's
# own last line in $scratch/$1.summary.
run_pytest() {
    local name=$1 environment=$2 summary
    shift 2
    local log=$scratch/$name.log
    # What runs in the background of a script ignores SIGINT, and so would what it starts. No cache: two of them run at a
    # time.
    env --default-signal=INT timeout --foreground --signal=INT --kill-after=20 "$PART_MAX_S" \
        "$environment/bin/pytest" -p no:cacheprovider "$@" 2>&1 | tee "$log" || failed "$name"
    # What a test needs is fetched, never skipped; only hardware can't be. Such a skip's reason starts with "hardware:".
    if grep '^SKIPPED' "$log" | grep -v ': hardware:'; then failed "$name: skipped tests"; fi
    # An exit code alone would also be 0 for a run that tested nothing.
    summary=$(grep -E '^(=+ )?[0-9].* in [0-9.]+s' "$log" | tail -n 1 | tr -d '=' | xargs) || true
    [[ $summary =~ ^[0-9]+\ passed ]] || failed "$name: summary"
    echo "${summary:-no summary}" >"$scratch/$name.summary"
}
