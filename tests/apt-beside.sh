# Sourced by what fetches Debian packages without touching the system: no list, no cache and no
# configuration of its apt is written, and no right is needed but to use the network.
#
#     apt_beside DIRECTORY RELEASE SUITE...   makes DIRECTORY an apt of its own
#     apt ARGUMENTS                           apt-get there; shows what it said where it fails
#
# What is downloaded is checked against the keys that the system trusts.

# apt_beside DIRECTORY RELEASE SUITE...: RELEASE is what is taken where more than one SUITE has it;
# nothing: the newest
apt_beside() {
    beside=$1 release=$2
    shift 2
    mkdir -p "$beside/lists/partial" "$beside/archives/partial" "$beside/sources"
    for suite in "$@"; do
        printf 'deb %s %s main\n' "$(mirror_of "$suite")" "$suite"
    done >"$beside/sources.list"
    # all that apt reads and writes is ours, but for the list of what is installed; hooks are not run
    cat >"$beside/apt.conf" <<END
#clear APT::Update;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
Dir::Etc::sourcelist "$beside/sources.list";
Dir::Etc::sourceparts "$beside/sources";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "$beside/sources";
Dir::State::lists "$beside/lists";
Dir::Cache "$beside";
Dir::Cache::archives "archives";
APT::Sandbox::User "root";
APT::Default-Release "$release";
APT::Update::Error-Mode "any";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
Debug::NoLocking "true";
END
}

# the mirror that this machine uses, and Debian's own where its lists do not tell
mirror_of() {
    like=${1%-backports}
    found=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' \
        'Created-By: Packages' | sed -n "s/^$like main //p" | head -n 1)
    case $like in
        *-security) printf '%s' "${found:-http://deb.debian.org/debian-security/}" ;;
        *) printf '%s' "${found:-http://deb.debian.org/debian/}" ;;
    esac
}

apt() {
    apt-get -q -c "$beside/apt.conf" "$@" >"$beside/log" 2>&1 || { cat "$beside/log" >&2; false; }
}
