// Package attest gathers and verifies evidence of who somebody is: facts about
// a local process for a workload, a join token for a node.
//
// It holds no identities and issues none: it says which selectors are true,
// and which entries they satisfy. Whether a selector is strong enough to be a
// boundary is decided where entries are read. A Child owns one goroutine,
// which waits for the program it started.
package attest

import (
	"context"
	"crypto"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/capture"
	"sallyport/internal/mesh"
)

// ErrEvidence says that evidence was refused. Errors that wrap it may be shown
// to whoever presented the evidence.
var ErrEvidence = errors.New("evidence refused")

// A NodeVerifier checks the evidence of one kind of node attestation on the
// issuer's side. key is the public key that the node asks a certificate for;
// evidence that may be used only once is bound to it. Safe for concurrent use.
// An error that wraps ErrEvidence is final; any other may be tried again.
type NodeVerifier interface {
	Verify(ctx context.Context, payload []byte, key crypto.PublicKey) (agent spiffeid.ID, selectors []mesh.Selector, err error)
}

// A ChildTree is a program that this process started, and what descends from
// it.
type ChildTree interface {
	// Contains reports whether pid is in the tree now.
	Contains(pid int) bool
	// Hash is the SHA-256 of the program as it was started.
	Hash() [32]byte
}

// Gather gives every selector that is true of p, which must still be the same
// process when Gather returns. tree is nil when this process started nothing.
//
//	unix:uid:N unix:gid:N unix:supplementary_gid:N unix:path:/x unix:sha256:HEX
//	cgroup:path:/x child:true child:sha256:HEX self:true
//	systemd:unit:NAME systemd:invocation:ID
//	container:id:ID docker:id:ID podman:id:ID containerd:id:ID
//	k8s:pod-uid:UID k8s:container-id:ID
//
// unix:path is left out when the path means another file here than to p.
func Gather(p capture.Process, tree ChildTree) ([]mesh.Selector, error) {
	sum, err := capture.HashExe(p.PID)
	if err != nil {
		return nil, fmt.Errorf("attest pid %d: %w", p.PID, err)
	}
	s := []mesh.Selector{
		{Type: "unix", Value: "uid:" + strconv.FormatUint(uint64(p.UID), 10)},
		{Type: "unix", Value: "gid:" + strconv.FormatUint(uint64(p.GID), 10)},
	}
	for _, g := range p.Groups {
		s = append(s, mesh.Selector{Type: "unix", Value: "supplementary_gid:" + strconv.FormatUint(uint64(g), 10)})
	}
	if isHere(p) {
		s = append(s, mesh.Selector{Type: "unix", Value: "path:" + p.ExePath})
	}
	s = append(s, mesh.Selector{Type: "unix", Value: "sha256:" + hex.EncodeToString(sum[:])})
	if p.Cgroup != "" {
		s = append(s, mesh.Selector{Type: "cgroup", Value: "path:" + p.Cgroup})
		unit, err := systemdSelectors(p.Cgroup, unitLinks)
		if err != nil {
			return nil, fmt.Errorf("attest pid %d: systemd unit: %w", p.PID, err)
		}
		s = append(append(s, unit...), containerSelectors(p.Cgroup)...)
	}
	if tree != nil && tree.Contains(p.PID) {
		h := tree.Hash()
		s = append(s, mesh.Selector{Type: "child", Value: "true"}, mesh.Selector{Type: "child", Value: "sha256:" + hex.EncodeToString(h[:])})
	}
	if p.PID == os.Getpid() {
		s = append(s, mesh.Selector{Type: "self", Value: "true"})
	}
	again, err := capture.Inspect(p.PID)
	if err != nil {
		return nil, fmt.Errorf("attest pid %d: %w", p.PID, err)
	}
	if !p.Same(again) {
		return nil, fmt.Errorf("attest pid %d: changed while it was attested: %w", p.PID, capture.ErrNoProcess)
	}
	return s, nil
}

// isHere reports whether the path of the executable names that file for us too.
// A process in a mount namespace of its own, which needs no privilege, can put
// any file at any path; and a removed file has a path that now means another.
func isHere(p capture.Process) bool {
	var st syscall.Stat_t
	return p.ExePath != "" && syscall.Lstat(p.ExePath, &st) == nil && uint64(st.Dev) == p.ExeDev && st.Ino == p.ExeInode
}

// Match gives the entries whose selectors are all in have, in their order. An
// entry without selectors matches nobody.
func Match(entries []mesh.Entry, have []mesh.Selector) []mesh.Entry {
	got := make(map[mesh.Selector]bool, len(have))
	for _, s := range have {
		got[s] = true
	}
	var out []mesh.Entry
	for _, e := range entries {
		ok := len(e.Selectors) > 0
		for _, s := range e.Selectors {
			ok = ok && got[s]
		}
		if ok {
			out = append(out, e)
		}
	}
	return out
}
