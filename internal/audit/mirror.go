package audit

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ErrNotNext is returned by Mirror.Receive for lines that do not continue the
// copy: records are missing between, or one of the two logs was changed.
var ErrNotNext = errors.New("audit records do not continue the copy")

// A Mirror is a copy of a log that another process writes, byte by byte: what
// leaves a machine cannot be changed there any more. It is safe for concurrent
// use.
type Mirror struct {
	cfg Config

	// keeping is the right to remove files, and to name them anew. It is taken
	// after mu.
	keeping sync.Mutex

	// mu guards what follows, and is taken before Log.mu.
	mu    sync.Mutex
	log   *Log
	start hash // of the first line
}

// OpenMirror opens the copy at cfg.Path, or starts one.
func OpenMirror(cfg Config) (*Mirror, error) {
	l, err := open(cfg, true)
	if err != nil {
		return nil, err
	}
	m := &Mirror{cfg: cfg, log: l}
	if l.seq == 0 {
		return m, nil
	}
	if m.start, err = firstHash(cfg.Path); err != nil {
		return nil, errors.Join(fmt.Errorf("open copy of audit log: %w", err), l.Close())
	}
	return m, nil
}

// firstHash is the hash of record 1, whether that is still there or not.
func firstHash(path string) (hash, error) {
	gone, err := kept(path)
	if err != nil || gone.removal != nil {
		return gone.name(), err
	}
	id, _, _, err := Begin(path)
	return id, err
}

// Receive adds lines, with or without their line feeds, in order, and returns
// once they are on the disk. Lines that the copy has already are passed over, so that a
// sender may send again what it has no answer for. A log that starts again at
// record 1, with another first record, is a new one: what there was before is
// kept as Path.old-<n>. After an error a part of the lines may have been added;
// Head tells.
func (m *Mirror) Receive(ctx context.Context, lines [][]byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	// A Sync that failed before is mended here: nobody runs the log of a copy.
	if err := m.log.Sync(ctx); err != nil {
		return err
	}
	for _, b := range lines {
		if err := m.add(ctx, b); err != nil {
			return err
		}
	}
	return m.log.Sync(ctx)
}

// Sweep keeps the copy by a rule, as a Keeper does: the witness signs the
// evidence, and the log of who keeps the copy has the record. What the heads of
// the log say, now or before, must be true of the copy, and nothing goes that
// they do not cover. Lines are received meanwhile.
func (m *Mirror) Sweep(ctx context.Context, cfg KeepConfig, w *Witness, heads []Head, into *Log) error {
	m.mu.Lock()
	m.keeping.Lock()
	log := m.log
	m.mu.Unlock()
	defer m.keeping.Unlock()
	if !cfg.WithoutSink {
		return nil
	}
	k := &Keeper{cfg: cfg, log: log, into: into, key: w.key, free: func() (uint64, string, error) { return log.covered(cfg, heads) }}
	return k.Sweep(ctx)
}

// leftAlone is how long nothing came into a copy whose last lines are not
// waited for any more, if its rule has no age.
const leftAlone = 24 * time.Hour

// covered is the newest record of a copy that is on the disk and that a head
// speaks of, and what holds the next. Without heads nobody signs the log.
func (l *Log) covered(cfg KeepConfig, heads []Head) (seq uint64, why string, err error) {
	last := l.Durable()
	var noted []Head
	if ended.MatchString(l.cfg.Path) {
		if noted, err = notedHeads(l.cfg.Path); err != nil {
			return 0, "", err
		}
		heads = append(slices.Clone(heads), noted...)
	}
	if len(heads) == 0 {
		return last, "it is not on the disk", nil
	}
	gone, err := kept(l.cfg.Path)
	if err != nil {
		return 0, "", err
	}
	within := func(h Head) bool { return h.Size > gone.last() && h.Size <= last }
	if slices.ContainsFunc(heads, func(h Head) bool { return within(h) || slices.ContainsFunc(h.Before, within) }) {
		best, err := fitting(l.cfg.Path, gone.last()+1, heads, gone.removal)
		switch {
		case err == nil:
			return best.Size, "no witness has signed more", nil
		case ended.MatchString(l.cfg.Path): // of a log that ended the head may be forgotten
			if err := disowned(l.cfg.Path, within, noted, heads); err != nil {
				return 0, "", err
			}
		default:
			return 0, "", fmt.Errorf("the copy is not the log that was cosigned, and nothing is removed; run audit verify: %w", err)
		}
	}
	at, err := l.received()
	if err != nil {
		return 0, "", err
	}
	if time.Since(at) < cmp.Or(cfg.Age, leftAlone) {
		return 0, "what was signed of it is not here yet", nil
	}
	return last, "it is not on the disk", nil // who would send the rest is gone
}

// received is when the last line came into a copy.
func (l *Log) received() (at time.Time, err error) {
	names, err := Segments(l.cfg.Path)
	for _, name := range slices.Backward(names) {
		st, err := os.Stat(name)
		switch {
		case err != nil:
			return at, err
		case st.Size() > 0:
			return st.ModTime(), nil
		}
	}
	return at, err
}

// Restarts says whether the line, which is of a first record, begins another
// log than the one that is copied. A proxy whose disk kept no cursor sends the
// same log from its first record.
func (m *Mirror) Restarts(line []byte) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	seq, _ := m.log.Head()
	if !bytes.HasSuffix(line, []byte("\n")) {
		line = append(line[:len(line):len(line)], '\n')
	}
	return seq > 0 && sha256.Sum256(line) != m.start
}

// Head returns the number of the newest record and the hash of its line.
func (m *Mirror) Head() (seq uint64, sum [32]byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.log.Head()
}

// Close brings what was received to the disk and closes the copy.
func (m *Mirror) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.log.Close()
}

// add adds one line, under mu.
func (m *Mirror) add(ctx context.Context, b []byte) error {
	if !bytes.HasSuffix(b, []byte("\n")) {
		b = append(b[:len(b):len(b)], '\n')
	}
	r, prev, err := ParseLine(b)
	if err != nil {
		return fmt.Errorf("receive audit records: %w", err)
	}
	seq, head := m.log.Head()
	sum := sha256.Sum256(b)
	switch {
	case r.Seq == 1 && seq > 0 && sum != m.start:
		if err := m.startAgain(ctx); err != nil {
			return fmt.Errorf("receive audit records: keep the log before: %w", err)
		}
		seq, head = 0, hash{}
	case r.Seq < seq || r.Seq == seq && sum == head:
		return nil
	}
	if r.Seq != seq+1 || prev != head {
		return fmt.Errorf("%w: have record %d with hash %x, got record %d after one with hash %x", ErrNotNext, seq, head[:4], r.Seq, prev[:4])
	}
	if err := m.log.appendLine(r.Seq, b); err != nil {
		return fmt.Errorf("receive audit records: %w", err)
	}
	if r.Seq == 1 {
		m.start = sum
	}
	return nil
}

// startAgain keeps all files of the copy under another name, with what is signed
// of it now, and opens an empty one, under mu.
func (m *Mirror) startAgain(ctx context.Context) error {
	var heads []Head
	if m.cfg.Heads != nil {
		var err error
		if heads, err = m.cfg.Heads(ctx); err != nil {
			return err
		}
	}
	m.keeping.Lock()
	defer m.keeping.Unlock()
	if err := m.log.Close(); err != nil {
		return err
	}
	names, err := Segments(m.cfg.Path)
	if err != nil {
		return err
	}
	for _, suffix := range []string{keptSuffix, plannedSuffix} {
		if _, err := os.Lstat(m.cfg.Path + suffix); err == nil {
			names = append([]string{m.cfg.Path + suffix}, names...)
		}
	}
	old := ""
	for n := 1; old == ""; n++ {
		name := m.cfg.Path + endedMark + strconv.Itoa(n)
		if _, err := os.Lstat(name); errors.Is(err, fs.ErrNotExist) {
			old = name
		} else if err != nil {
			return err
		}
	}
	if len(heads) > 0 {
		if err := noteHeads(old, heads); err != nil {
			return err
		}
	}
	for _, name := range names {
		if err := os.Rename(name, old+strings.TrimPrefix(name, m.cfg.Path)); err != nil {
			return err
		}
	}
	m.cfg.Log.Warn("a log that is copied here started again from its first record", "path", m.cfg.Path, "kept", old)
	m.log, err = open(m.cfg, true)
	return err
}

// appendLine adds a line that was made elsewhere and continues the chain.
func (l *Log) appendLine(seq uint64, b []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.usable(); err != nil {
		return err
	}
	l.buf = append(l.buf[:0], b...)
	if err := l.put(seq); err != nil {
		return l.failed(err, nil)
	}
	l.fail = nil
	return nil
}
