package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"sallyport/internal/daemon"
	"sallyport/internal/policyset"
	"sallyport/internal/registry"
)

// floorFile is beside the database, and on this machine when that is not: who
// sets the database back does not set it back.
const floorFile = "policy.floor"

// openFloor reads which signed set was the newest in force here.
func (in *issuer) openFloor() (registry.Floor, error) {
	if !in.cfg.Policy.Signers.Pinned() {
		return registry.Floor{}, nil
	}
	path := filepath.Join(in.cfg.DataDir, floorFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return registry.Floor{}, nil
	}
	if err != nil {
		return registry.Floor{}, fmt.Errorf("read the newest set that was in force: %w", err)
	}
	text, ok := strings.CutSuffix(string(b), "\n")
	revision, set, _ := strings.Cut(text, " ")
	n, err := strconv.ParseUint(revision, 10, 64)
	if !ok || err != nil || n < 1 || n > policyset.MaxRevision || !policyset.IsHash(set) {
		return registry.Floor{}, daemon.Hint(fmt.Errorf("%s says %.100q: want the revision and the hash of the newest set that was in force", path, text), "put it back, or remove it if the database was never set back")
	}
	return registry.Floor{Revision: n, Set: set}, nil
}

// keepFloor writes it down. What is in force stays so when that fails: the
// database has it.
func (in *issuer) keepFloor(f registry.Floor) {
	path := filepath.Join(in.cfg.DataDir, floorFile)
	if err := daemon.WriteFile(path, fmt.Appendf(nil, "%d %s\n", f.Revision, f.Set), 0o600); err != nil {
		in.log.Error("the newest set in force is not written down: an older one would be taken from the database after a restart", "revision", f.Revision, "err", err)
	}
}
