package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
)

// pollEvery is how often a Tail that is at the end looks for more. The upload
// of audit records bears that much delay; an idle proxy bears the 20 reads.
const pollEvery = 50 * time.Millisecond

// A Tail reads the lines of a log while it is written, across files put aside.
// It is used by one goroutine, which may be in another process.
type Tail struct {
	path  string
	after uint64
	f     *os.File
	off   int64 // of the line that comes next in f
	buf   []byte
	n     int // how much of buf is of the file from off on
	used  int // how much of that was returned
	// one is the hash of record 1, zero when it was not read. moved: the file is
	// not the first that was opened.
	one   hash
	moved bool
}

// ErrBegunAgain is returned by a Tail of a log in whose place another was begun,
// as in a copy of a log that started again.
var ErrBegunAgain = errors.New("another audit log was begun in the place of the one that was read")

// OpenTail starts after record number after; 0 means from the beginning, which is
// the oldest record that is kept. The log need not exist yet.
func OpenTail(path string, after uint64) (*Tail, error) {
	if path == "" {
		return nil, errors.New("tail audit log: path: missing")
	}
	return &Tail{path: path, after: after, buf: make([]byte, 2*maxLine)}, nil
}

// Close releases the file.
func (t *Tail) Close() error {
	if t.f == nil {
		return nil
	}
	f := t.f
	t.f = nil
	return f.Close()
}

// Next returns the next whole line with its line feed, and its number. It waits
// until there is one or ctx ends. The line is valid until the next call. A log
// that does not have the records after the cursor is an error.
func (t *Tail) Next(ctx context.Context) ([]byte, uint64, error) {
	timer := time.NewTimer(pollEvery)
	defer timer.Stop()
	for {
		if err := ctx.Err(); err != nil {
			return nil, 0, context.Cause(ctx)
		}
		b, seq, err := t.Poll()
		if err != nil {
			return nil, 0, err
		}
		if b != nil {
			return b, seq, nil
		}
		timer.Reset(pollEvery)
		select {
		case <-ctx.Done():
			return nil, 0, context.Cause(ctx)
		case <-timer.C:
		}
	}
}

// Poll is Next without the wait: the line is nil when there is nothing yet.
func (t *Tail) Poll() ([]byte, uint64, error) {
	b, seq, err := t.poll()
	if err != nil {
		err = fmt.Errorf("tail audit log: %w", err)
	}
	return b, seq, err
}

// poll returns nil when there is nothing yet.
func (t *Tail) poll() ([]byte, uint64, error) {
	for {
		if t.f == nil {
			if err := t.openSegment(); err != nil || t.f == nil {
				return nil, 0, err
			}
		}
		b, err := t.line()
		if err != nil {
			return nil, 0, err
		}
		if b == nil {
			more, err := t.nextSegment()
			if err != nil || !more {
				return nil, 0, err
			}
			continue
		}
		seq, ok := lineSeq(b)
		if !ok {
			return nil, 0, fmt.Errorf("%s: a line after record %d is not a record; run audit verify", t.f.Name(), t.after)
		}
		if seq == 1 {
			// A file that was written anew has the same record.
			sum := sha256.Sum256(b)
			if t.moved && sum != t.one {
				return nil, 0, ErrBegunAgain
			}
			t.one = sum
		}
		if seq <= t.after {
			continue
		}
		if seq != t.after+1 {
			return nil, 0, fmt.Errorf("%s: record %d is missing, the next is %d", t.f.Name(), t.after+1, seq)
		}
		t.after = seq
		return b, seq, nil
	}
}

// line returns the next whole line of the open file. The beginning of a line
// is read again each time, since a restart of the writer may replace it.
func (t *Tail) line() ([]byte, error) {
	if i := bytes.IndexByte(t.buf[t.used:t.n], '\n'); i >= 0 {
		return t.take(i + 1), nil
	}
	t.off += int64(t.used)
	t.used, t.n = 0, 0
	n, err := t.f.ReadAt(t.buf, t.off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	i := bytes.IndexByte(t.buf[:n], '\n')
	if i < 0 {
		if n == len(t.buf) {
			return nil, fmt.Errorf("%s: a line is longer than any record", t.f.Name())
		}
		return nil, nil
	}
	t.n = n
	return t.take(i + 1), nil
}

func (t *Tail) take(n int) []byte {
	b := t.buf[t.used : t.used+n]
	t.used += n
	return b
}

// openSegment opens the file that holds the record after the cursor, or the
// one that will.
func (t *Tail) openSegment() error {
	names, err := Segments(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if t.after == 0 {
		first, err := beginning(t.path)
		if err != nil {
			return err
		}
		t.after = first - 1
	}
	for i := len(names) - 1; ; i-- {
		if err := t.use(names[i]); err != nil || t.f == nil || i == 0 {
			return err
		}
		// A file without a record yet does not hold the one we want, either.
		if first, err := firstSeq(t.f); err == nil && first <= t.after+1 {
			return nil
		}
		if err := t.Close(); err != nil {
			return err
		}
	}
}

func (t *Tail) use(name string) error {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // put aside at this moment; the next poll finds it
	}
	if err != nil {
		return err
	}
	t.f, t.off, t.n, t.used = f, 0, 0, 0
	return nil
}

// nextSegment goes on to the file after the open one, when that was put aside
// and is at its end. It reports whether reading may go on.
func (t *Tail) nextSegment() (bool, error) {
	mine, err := t.f.Stat()
	if err != nil {
		return false, err
	}
	now, err := os.Stat(t.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil // removed, but what is open may still grow
	case err != nil:
		return false, err
	case os.SameFile(mine, now):
		return false, nil
	}
	if mine.Size() > t.off {
		return true, nil // it grew between the read and now
	}
	first, err := firstSeq(t.f)
	if err != nil {
		return false, err
	}
	names, err := Segments(t.path)
	if err != nil {
		return false, err
	}
	done, next := segmentName(t.path, first), t.path
	if again, err := os.Stat(done); err == nil && !os.SameFile(mine, again) {
		next = done // written anew since a sync failed, and then put aside
	}
	for _, name := range names {
		if next == t.path && name != t.path && name > done {
			next = name
			break
		}
	}
	if err := t.Close(); err != nil {
		return false, err
	}
	t.moved = true
	if err := t.use(next); err != nil || t.f == nil {
		return false, err
	}
	if again, err := Segments(t.path); err != nil || len(again) != len(names) {
		return false, errors.Join(err, t.Close()) // put aside meanwhile: look anew
	}
	return true, nil
}
