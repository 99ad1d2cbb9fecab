package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"sallyport/internal/audit"
)

const (
	// reserve is what the disk keeps for the issuer itself: one part in
	// reservePart of it, at most reserveMost bytes. A proxy that floods the
	// issuer with records must not keep it from recording, and so from signing.
	reservePart = 20
	reserveMost = 1 << 30
	// startsApart is the least time between two logs of one proxy that start
	// from their first record, each of which makes files.
	startsApart = time.Minute
	// tellApart is how often the issuer's own log says that lines of a proxy
	// do not continue its copy.
	tellApart = time.Minute
)

// received keeps copies of the audit logs of proxies: one for each workload of
// each node, whose chain of hashes is checked as it grows. Lines that do not
// continue the copy are kept too, in a file apart, and the issuer's own log
// says so: nothing that a proxy sends is lost, and nothing is taken for what
// it is not. It is safe for concurrent use; one proxy does not wait for the
// disk of another.
type received struct {
	dir  string
	keep audit.KeepConfig
	log  *slog.Logger
	tell func(*audit.Record) error
	now  func() time.Time
	free func() (free, all uint64, err error)
	// signed is what witnesses have signed of all logs; nil when nobody has.
	signed func(context.Context) ([]audit.Head, error)

	// heard takes note of what the page shows; nil in tests.
	heard *heard
	// leads says that the proxy of a workload is a gateway; nil when none is.
	leads func(agent, workload spiffeid.ID) bool

	searching chan struct{} // the right to read all of them

	mu     sync.Mutex // guards copies
	copies map[proxyName]*copied
}

type proxyName struct{ agent, workload spiffeid.ID }

// copied is the copy of one proxy's log.
type copied struct {
	path string

	mu      sync.Mutex // guards what follows
	mirror  *audit.Mirror
	loose   *os.File
	started time.Time // when the log last started from its first record
	told    time.Time
	since   int // batches that did not continue, since told
}

func openReceived(dir string, keep audit.KeepConfig, log *slog.Logger, tell func(*audit.Record) error) (*received, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("keep received audit records: %w", err)
	}
	free := func() (uint64, uint64, error) {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		return st.Bavail * uint64(st.Bsize), st.Blocks * uint64(st.Bsize), err
	}
	return &received{dir: dir, keep: keep, log: log, tell: tell, now: time.Now, free: free, copies: map[proxyName]*copied{}, searching: make(chan struct{}, 1)}, nil
}

// Receive is control.AuditSink.
func (r *received) Receive(ctx context.Context, agent, workload spiffeid.ID, lines [][]byte) error {
	free, all, err := r.free()
	if err != nil {
		return fmt.Errorf("keep received audit records: %w", err)
	}
	if keep := min(all/reservePart, reserveMost); free < keep {
		return fmt.Errorf("keep received audit records: %d bytes are free in %s, the issuer keeps %d for itself; free some space", free, r.dir, keep)
	}
	c, err := r.copyOf(proxyName{agent, workload})
	if err != nil {
		return fmt.Errorf("keep received audit records: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mirror == nil {
		return errors.New("keep received audit records: the issuer is stopping")
	}
	started := c.started
	why := c.mayStart(lines, r.now())
	if why == nil {
		before, _ := c.mirror.Head()
		err := c.mirror.Receive(ctx, lines)
		if err == nil {
			if head, _ := c.mirror.Head(); head < before {
				before = 0 // it began anew
			}
			if r.heard != nil {
				gateway := sync.OnceValue(func() bool { return r.leads != nil && r.leads(agent, workload) })
				r.heard.take(proxyName{agent, workload}, gateway, lines, before)
			}
			return nil
		}
		if !errors.Is(err, audit.ErrNotNext) && !malformed(lines) {
			c.started = started // it is sent again
			return err
		}
		why = err
	}
	if err := c.keepLoose(lines); err != nil {
		return fmt.Errorf("keep received audit records: %w", err)
	}
	return c.complain(r, agent, workload, why)
}

// copyOf opens the copy of a proxy's log.
func (r *received) copyOf(p proxyName) (*copied, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.copies[p]; c != nil {
		return c, nil
	}
	if r.copies == nil {
		return nil, errors.New("the issuer is stopping")
	}
	name := audit.CopyName(p.workload, p.agent)
	path := filepath.Join(r.dir, name)
	m, err := audit.OpenMirror(audit.Config{Path: path, Log: r.log, MaxFile: r.keep.MaxFile(), Heads: r.headsOf(name)})
	if err != nil {
		return nil, err
	}
	c := &copied{path: path, mirror: m}
	r.copies[p] = c
	return c, nil
}

// headsOf tells what is signed of the log that a copy is of.
func (r *received) headsOf(name string) func(context.Context) ([]audit.Head, error) {
	return func(ctx context.Context) ([]audit.Head, error) {
		if r.signed == nil {
			return nil, nil
		}
		all, err := r.signed(ctx)
		heads, _ := audit.HeadsOf(all, name)
		return heads, err
	}
}

// mayStart refuses what would make the copy start again and again: every start
// puts the files before it aside.
func (c *copied) mayStart(lines [][]byte, now time.Time) error {
	first := []byte(`{"v":1,"seq":1,`)
	for i, l := range lines {
		if !bytes.HasPrefix(l, first) {
			continue
		}
		switch seq, _ := c.mirror.Head(); {
		case i > 0 && seq > 0, c.mirror.Restarts(l) && now.Sub(c.started) < startsApart:
			return errors.New("the log starts from its first record too often")
		case seq == 0, c.mirror.Restarts(l):
			c.started = now
		}
	}
	return nil
}

// malformed says if some line is not a record.
func malformed(lines [][]byte) bool {
	for _, l := range lines {
		if _, _, err := audit.ParseLine(append(l[:len(l):len(l)], '\n')); err != nil {
			return true
		}
	}
	return false
}

// keepLoose keeps lines that do not continue the copy, durably. mu is held.
func (c *copied) keepLoose(lines [][]byte) error {
	if c.loose == nil {
		f, err := os.OpenFile(c.path+".loose", os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
		c.loose = f
	}
	if _, err := c.loose.Write(append(bytes.Join(lines, []byte("\n")), '\n')); err != nil {
		return err
	}
	return c.loose.Sync()
}

// complain writes into the issuer's own log that a proxy's does not add up, now
// and then. mu is held.
func (c *copied) complain(r *received, agent, workload spiffeid.ID, why error) error {
	c.since++
	now := r.now()
	if !c.told.IsZero() && now.Sub(c.told) < tellApart {
		return nil
	}
	r.log.Warn("audit records of a proxy do not continue its log", "agent", agent.String(), "workload", workload.String(), "batches", c.since, "kept", c.path+".loose", "err", why)
	err := r.tell(&audit.Record{
		Kind: audit.KindGap, Src: workload.String(), Peer: agent.String(), Reason: "received",
		Detail: fmt.Sprintf("%d batches do not continue the copy, kept in %s: %v", c.since, filepath.Base(c.path)+".loose", why),
	})
	if err == nil {
		c.told, c.since = now, 0
	}
	return err
}

// Close brings everything to the disk and closes it.
func (r *received) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for _, c := range r.copies {
		c.mu.Lock()
		errs = append(errs, c.mirror.Close())
		c.mirror = nil
		if c.loose != nil {
			errs = append(errs, c.loose.Close())
		}
		c.mu.Unlock()
	}
	r.copies = nil
	return errors.Join(errs...)
}
