package agent

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// What is open is judged by the snapshot that Snapshot gives: a service whose
// protocol is another by now must see that.
func TestRejudgeSeesTheNewSnapshot(t *testing.T) {
	is := newIssuer(t)
	var own atomic.Pointer[Agent]
	var saw atomic.Pointer[mesh.Snapshot]
	p := is.newProxy(t.TempDir(), is.token("node-b"), func(c *Config) {
		c.Rejudge = func() {
			if a := own.Load(); a != nil {
				saw.Store(a.Snapshot())
			}
		}
	})
	own.Store(p.Agent)
	p.join().serves()
	await(t, func() bool { return saw.Load() != nil && saw.Load() == p.Snapshot() })
}

// A process that is to take over acts on what the one before keeps on disk, and
// has the tie to the issuer once that one is gone.
func TestFollowActsOnWhatIsKept(t *testing.T) {
	is := newIssuer(t)
	dir := t.TempDir()
	before := is.newProxy(dir, is.token("node-b"))
	if err := before.Known(); err == nil {
		t.Error("something is known in an empty directory")
	}
	before.join().serves()
	await(t, func() bool {
		for _, f := range []string{nodeFile, heldFile, snapshotFile, entriesFile} {
			if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
				return false
			}
		}
		return true
	})
	next := is.newProxy(dir, "")
	if err := next.Known(); err != nil {
		t.Fatal(err)
	}
	gone, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- next.Follow(context.Background(), gone) }()
	await(t, func() bool { return next.ready.Err() == nil && next.Generation() > 0 })

	// A revocation and an SVID of the process before.
	generation := next.Generation()
	revoked := []mesh.RevokedSVID{{Serial: "abcdef", ID: second, Until: time.Now().Add(time.Hour), Why: mesh.WhyRevoked}}
	before.OnRevoked(t.Context(), revoked)
	await(t, func() bool { return len(next.Source().Revoked()) == len(before.Source().Revoked()) })
	if next.rejudged.Load() == 0 {
		t.Error("what is open to it was not closed")
	}
	st := before.Source().Current()
	if err := st.Save(next.file(heldFile)); err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return next.Generation() > generation })

	// A policy, and one that is damaged, which changes nothing.
	used := next.Snapshot()
	kept, err := os.ReadFile(next.file(snapshotFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{kept[:len(kept)/2], kept} {
		if err := daemon.WriteFile(next.file(snapshotFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	await(t, func() bool { return next.Snapshot() != used })
	before.stop()
	close(gone)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	next.Hold(nil, nil)
	next.run()
	await(t, func() bool { return len(is.registry.Proxies()) == 1 })
}
