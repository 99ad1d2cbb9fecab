package shadow

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"testing"

	"sallyport/internal/mesh"
)

// unreached is a Mirror whose shadow cannot be reached, and that runs.
func unreached(t *testing.T, l Limits) *Mirror {
	m, err := New(Config{
		Limits: l, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
		Lend: func(context.Context, mesh.Backend, bool) (Line, error) { return Line{}, errors.New("no") },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() { stop(); <-done })
	return m
}

func TestTapeKeepsWhatItIsTold(t *testing.T) {
	m := unreached(t, Limits{})
	random := rand.NewChaCha8([32]byte{1})
	for _, size := range []int{0, 1, inline - 1, inline, inline + 1, 5 << 20} {
		tp := m.tape()
		tp.add([]byte("a first try"))
		tp.rewind()
		want := make([]byte, size)
		_, _ = random.Read(want)
		for rest := want; len(rest) > 0; {
			n := min(len(rest), 40_000)
			tp.add(rest[:n])
			rest = rest[n:]
		}
		for range 2 { // each shadow reads anew
			got, err := io.ReadAll(tp.reader())
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes: got %d, %v, %s", size, len(got), err, tp.lost())
			}
		}
		if size > 2*inline {
			b := make([]byte, inline)
			if _, err := tp.file.ReadAt(b, 0); err != nil || bytes.Equal(b, want[:inline]) {
				t.Errorf("the file has the message in the clear, or not at all: %v", err)
			}
		}
		tp.release()
	}
	if m.memory.Used() != 0 || m.disk.Used() != 0 {
		t.Errorf("kept: %d bytes of memory, %d of files", m.memory.Used(), m.disk.Used())
	}
	if left, err := os.ReadDir(m.cfg.Dir); err != nil || len(left) > 0 {
		t.Errorf("files with names: %v, %v", left, err)
	}
}

func TestTapeDropsWhatHasNoRoom(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		l          Limits
		size       int
	}{
		{"a message that is too large", outcomeTooLarge, Limits{Message: 1 << 20}, 1<<20 + 1},
		{"memory is full", outcomeNoRoom, Limits{Memory: 100}, 101},
		{"files are full", outcomeNoRoom, Limits{Memory: 1 << 20, Spill: 1 << 20}, 4 << 20},
		{"no files", outcomeNoRoom, Limits{Memory: 1 << 20, Spill: -1}, inline + 1},
		{"no files, but memory", "", Limits{Memory: 16 << 20, Spill: -1}, inline + 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := unreached(t, tt.l)
			tp := m.tape()
			for range tt.size / 100 {
				tp.add(make([]byte, 100))
			}
			tp.add(make([]byte, tt.size%100))
			if got := tp.lost(); got != tt.want {
				t.Errorf("lost by %q, want %q", got, tt.want)
			}
			if tp.lost() != "" && tp.reader() != nil {
				t.Error("a lost message can be read")
			}
			tp.reader() // waits for the file
			tp.release()
			if m.memory.Used() != 0 || m.disk.Used() != 0 {
				t.Errorf("kept: %d bytes of memory, %d of files", m.memory.Used(), m.disk.Used())
			}
		})
	}
}
