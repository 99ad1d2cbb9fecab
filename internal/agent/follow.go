package agent

import (
	"context"
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"sallyport/internal/audit"
)

// followEvery is how often the files of the process before are looked at.
const followEvery = 50 * time.Millisecond

// ErrUnknown is returned by Known while there is nothing to serve by.
var ErrUnknown = errors.New("no identity or no policy is kept on disk")

// Known says why a process cannot take over with what is on disk.
func (a *Agent) Known() error {
	if _, err := a.Self(); err != nil || a.Snapshot() == nil {
		return ErrUnknown
	}
	return nil
}

// Follow acts on what the process before leaves on disk, which has the tie to the
// issuer until gone is closed. It returns then, or when ctx ends.
func (a *Agent) Follow(ctx context.Context, gone <-chan struct{}) error {
	var watch sync.WaitGroup
	defer watch.Wait()
	watching, stop := context.WithCancel(ctx)
	defer stop()
	watch.Go(func() { _ = a.watchIdentity(watching) }) // it only ever returns nil
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	seen := map[string]look{}
	for {
		a.reread(seen)
		select {
		case <-ctx.Done():
			return nil
		case <-gone:
			return a.succeed(seen)
		case <-tick.C:
		}
	}
}

// succeed takes over what the process before has left at its end: also the floor
// under the policies.
func (a *Agent) succeed(seen map[string]look) error {
	pins, err := openPins(a.cfg)
	if err != nil {
		return err
	}
	if pins != nil {
		a.pins = pins
		delete(seen, snapshotFile)
	}
	a.reread(seen)
	return nil
}

// Hold gives the agent the tree and the spool of the audit log, which only the
// process has that writes the log. It is called before Run.
func (a *Agent) Hold(tree *audit.Tree, spool *audit.Spool) {
	a.cfg.Tree = tree
	a.spool = spool.Reader("the issuer", a.keptCursor())
}

// A look is what tells one version of a file from the next: each is a file of
// its own.
type look struct {
	inode uint64
	size  int64
	at    time.Time
}

// reread acts on the files that are others than those seen.
func (a *Agent) reread(seen map[string]look) {
	for _, f := range []struct {
		name string
		act  func() error
	}{
		{revokedFile, func() error { defer a.cfg.Rejudge(); return a.resumeRevoked() }},
		{nodeFile, func() error { return a.resumeIdentity(nodeFile) }},
		{heldFile, func() error { return a.resumeIdentity(heldFile) }},
		{entriesFile, a.resumeEntries},
		{snapshotFile, a.resumePolicy},
	} {
		var now look
		if st, err := os.Stat(a.file(f.name)); err == nil {
			now = look{size: st.Size(), at: st.ModTime()}
			if sys, ok := st.Sys().(*syscall.Stat_t); ok {
				now.inode = sys.Ino
			}
		}
		if now == seen[f.name] {
			continue
		}
		seen[f.name] = now
		if err := f.act(); err != nil {
			a.cfg.Log.Error("what the process before has left is of no use", "file", f.name, "err", err)
		}
	}
}
