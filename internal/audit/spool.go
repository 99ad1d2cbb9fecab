package audit

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync/atomic"
	"time"
)

// ErrSpoolFull is why a record is refused while too much waits to be delivered.
var ErrSpoolFull = errors.New("audit spool is full")

// SpoolConfig bounds what waits on this machine to be delivered.
type SpoolConfig struct {
	// MaxBytes is how many bytes of records may wait for the slowest of the
	// sinks and the issuer. Beyond it, what must be recorded is refused.
	// Default 1 GiB, at least 64 KiB.
	MaxBytes int64 `yaml:"max_bytes"`
}

const (
	defaultSpool = 1 << 30
	leastSpool   = 64 << 10
)

// Validate reports every mistake by field name.
func (c SpoolConfig) Validate() error {
	if c.MaxBytes != 0 && c.MaxBytes < leastSpool {
		return fmt.Errorf("max_bytes: %d is too small; write at least %d, or leave it out for %d", c.MaxBytes, leastSpool, int64(defaultSpool))
	}
	return nil
}

// A Spool counts what of a log waits for those who get the records. Its counts
// may be too high, by at most one part in 256 of the bound, and never too low.
// A nil Spool counts nothing. It is safe for concurrent use.
type Spool struct {
	log *Log
	max int64

	// What follows is guarded by Log.mu.
	end     int64 // where the newest record ends, from the oldest that is known
	taken   int64 // what every reader has, at least
	marks   []mark
	readers []*Reader
}

// A mark is a place in the log between two records.
type mark struct {
	seq uint64 // of the record before
	at  int64  // where that ends
	// time of the record after.
	time time.Time
}

const (
	// markEvery is how many bytes and how much time lie between two marks, at
	// most.
	markEvery = 64 << 10
	markApart = time.Second
	// maxMarks bounds the marks: of more, every second one goes.
	maxMarks = 8192
)

// A Reader is somebody who gets the records. A nil Reader is nobody.
type Reader struct {
	s    *Spool
	name string
	seq  uint64
}

// Spool begins to hold the log to a bound. It is called once. Nothing is
// refused before there is a Reader.
func (l *Log) Spool(cfg SpoolConfig) (*Spool, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("audit spool: %w", err)
	}
	s := &Spool{log: l, max: cmp.Or(cfg.MaxBytes, defaultSpool)}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := s.survey(); err != nil {
		return nil, fmt.Errorf("audit spool: %w", err)
	}
	l.spool = s
	return s, nil
}

// Spool begins to hold the log to a bound.
func (l *Ledger) Spool(cfg SpoolConfig) (*Spool, error) { return l.log.Spool(cfg) }

// Reader adds somebody who has the records up to a number.
func (s *Spool) Reader(name string, seq uint64) *Reader {
	if s == nil {
		return nil
	}
	r := &Reader{s: s, name: name}
	s.log.mu.Lock()
	s.readers = append(s.readers, r)
	s.log.mu.Unlock()
	r.Delivered(seq)
	return r
}

// Delivered says that the reader has the records up to a number, and that it
// will not be forgotten. A number that the log has not reached is of another
// log: then nothing of this one is delivered.
func (r *Reader) Delivered(seq uint64) {
	if r == nil {
		return
	}
	l := r.s.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if seq > l.seq {
		seq = 0
	}
	r.seq = seq
	r.s.settle()
	if !errors.Is(l.fail, ErrSpoolFull) || l.usable() != nil || r.s.fits(usualLine, false) != nil {
		return
	}
	if l.lost() > 0 && l.tellRefused() != nil {
		return // the next record, or the next delivery, tries again
	}
	l.writable()
}

// usualLine is more bytes than most records have.
const usualLine = 1 << 10

// settle finds what everybody has, under Log.mu.
func (s *Spool) settle() {
	if len(s.readers) == 0 {
		s.taken = s.end
		return
	}
	slowest := slices.MinFunc(s.readers, func(a, b *Reader) int { return cmp.Compare(a.seq, b.seq) }).seq
	if slowest == s.log.seq {
		s.taken, s.marks = s.end, s.marks[:0]
		return
	}
	i, ok := slices.BinarySearchFunc(s.marks, slowest, func(m mark, n uint64) int { return cmp.Compare(m.seq, n) })
	if !ok {
		i--
	}
	// What is before the slowest reader is kept only until it steps back, which
	// happens when the records are sent from the beginning: then s.taken is too
	// high by what is gone, and the bound is that much higher for once.
	if i >= 0 {
		s.taken = s.marks[i].at
		s.marks = slices.Delete(s.marks, 0, i)
	} else {
		s.taken = 0
	}
}

// note marks the place before a record that is about to be written, if there is
// reason to, under Log.mu.
func (s *Spool) note(at time.Time) {
	if n := len(s.marks); n > 0 {
		last := s.marks[n-1]
		if d := at.Sub(last.time); s.end-last.at < min(markEvery, s.max/256) && d < markApart {
			return
		}
		if n >= maxMarks {
			for i := range n / 2 {
				s.marks[i] = s.marks[2*i]
			}
			s.marks = s.marks[:n/2]
		}
	}
	s.marks = append(s.marks, mark{s.log.seq, s.end, at})
}

// fits says if a record may be written. What speaks of something that has
// happened may take an eighth more. It is called under Log.mu.
func (s *Spool) fits(n int, done bool) error {
	bound := s.max
	if done {
		bound += s.max / 8
	}
	if waits := s.end - s.taken; waits > 0 && waits+int64(n) > bound && len(s.readers) > 0 {
		return fmt.Errorf("%w: %d bytes wait for %s, the bound is %d", ErrSpoolFull, waits, s.slowest(), s.max)
	}
	return nil
}

// slowest names who has least, under Log.mu.
func (s *Spool) slowest() string {
	return slices.MinFunc(s.readers, func(a, b *Reader) int { return cmp.Compare(a.seq, b.seq) }).name
}

// SpoolState is how a spool stands.
type SpoolState struct {
	// Bytes wait to be delivered, of at most Limit.
	Bytes, Limit int64
	// Oldest is how long the oldest of them has waited.
	Oldest time.Duration
	// NoRoom and NoDisk count records that were not kept because the spool was
	// full, or could not be written, since the start.
	NoRoom, NoDisk uint64
}

// State returns how the spool stands.
func (s *Spool) State() (st SpoolState) {
	if s == nil {
		return st
	}
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	st = SpoolState{Bytes: s.end - s.taken, Limit: s.max, NoRoom: s.log.noRoom, NoDisk: s.log.noDisk}
	if len(s.readers) == 0 {
		st.Bytes = 0
	}
	if st.Bytes > 0 && len(s.marks) > 0 {
		st.Oldest = max(0, time.Since(s.marks[0].time))
	}
	return st
}

// survey marks places in what is there already, under Log.mu. Of a log that is
// larger than the bound only the newest part is looked at closely.
func (s *Spool) survey() error {
	l := s.log
	if l.mem != nil || l.seq == 0 {
		return nil
	}
	names, err := Segments(l.cfg.Path)
	if err != nil {
		return err
	}
	var sizes []int64
	var all int64
	for _, name := range names {
		st, err := os.Stat(name)
		if err != nil {
			return err
		}
		sizes = append(sizes, st.Size())
		all += st.Size()
	}
	for i, name := range names {
		step := min(markEvery, s.max/256)
		if all-s.end > s.max+sizes[i] {
			step = sizes[i] + 1
		}
		if err := s.sample(name, sizes[i], step); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		s.end += sizes[i]
	}
	s.taken = s.end
	return nil
}

// sample marks a place about every step bytes of a file.
func (s *Spool) sample(name string, size, step int64) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 2*maxLine)
	for off := int64(0); off < size; {
		n, err := f.ReadAt(buf, off)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		skip := 0
		if off > 0 { // most likely in the middle of a line
			skip = bytes.IndexByte(buf[:n], '\n') + 1
		}
		if end := bytes.IndexByte(buf[skip:n], '\n'); end >= 0 && (skip > 0 || off == 0) {
			r, _, err := ParseLine(buf[skip : skip+end+1])
			if err != nil {
				return fmt.Errorf("at byte %d: %w", off+int64(skip), err)
			}
			s.marks = append(s.marks, mark{r.Seq - 1, s.end + off + int64(skip), r.Time})
		}
		off += max(step, int64(skip)+1)
	}
	return nil
}

// reasonRefused is that of the gap records which count what was refused, and
// refusalMark stands before its number in an id.
const (
	reasonRefused = "refused"
	refusalMark   = "-r"
)

// lost is how many refused records no gap record speaks of yet, under mu.
func (l *Log) lost() uint64 {
	return atomic.LoadUint64(l.refused) - atomic.LoadUint64(l.refusedTold)
}

// tellRefused writes the gap record for what was refused, under mu.
func (l *Log) tellRefused() error {
	all, told := atomic.LoadUint64(l.refused), atomic.LoadUint64(l.refusedTold)
	gap := Record{
		Kind: KindGap, Reason: reasonRefused, Count: all - told, Total: all,
		Detail: fmt.Sprintf("%d records could not be written, refusals r%x to r%x: %v", all-told, told+1, all, l.fail),
	}
	if err := l.write(&gap); err != nil {
		return err
	}
	atomic.StoreUint64(l.refusedTold, all)
	return nil
}
