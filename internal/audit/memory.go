package audit

import (
	"bytes"
	"log/slog"
)

// memory is a disk in memory.
type memory struct{ buf bytes.Buffer }

func (m *memory) Write(b []byte) (int, error) { return m.buf.Write(b) }

func (m *memory) Truncate(n int64) error {
	m.buf.Truncate(int(n))
	return nil
}

func (m *memory) Sync() error  { return nil }
func (m *memory) Close() error { return nil }

// NewMemory returns a log that keeps its lines in memory, for tests. It does
// not forget: it is not for long runs.
func NewMemory() *Log {
	l := newLog(Config{Path: "memory", Log: slog.New(slog.DiscardHandler)})
	m := &memory{}
	l.file, l.mem = m, &m.buf
	return l
}

// Lines returns a copy of what a log made by NewMemory holds.
func (l *Log) Lines() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mem == nil {
		return nil
	}
	return bytes.Clone(l.mem.Bytes())
}

// Records returns the records of a log made by NewMemory as they were written.
func (l *Log) Records() []Record {
	var out []Record
	for b := range bytes.Lines(l.Lines()) {
		if r, _, err := ParseLine(b); err == nil {
			out = append(out, r)
		}
	}
	return out
}
