package audit

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func mirrorAt(t *testing.T, path string) *Mirror {
	t.Helper()
	m, err := OpenMirror(Config{Path: path, Log: quiet(), MaxFile: 3000})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func linesOf(t *testing.T, records int) [][]byte {
	t.Helper()
	l := NewMemory()
	mustAppend(t, l, records)
	return bytes.SplitAfter(l.Lines(), []byte("\n"))[:records]
}

func mustReceive(t *testing.T, m *Mirror, lines [][]byte, head uint64) {
	t.Helper()
	if err := m.Receive(t.Context(), lines); err != nil {
		t.Fatal(err)
	}
	if seq, _ := m.Head(); seq != head {
		t.Fatalf("copy ends with record %d, want %d", seq, head)
	}
}

func TestMirrorKeepsTheBytes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "copy.log")
	lines := linesOf(t, 30)
	m := mirrorAt(t, path)
	mustReceive(t, m, nil, 0)
	mustReceive(t, m, lines[:4], 4)
	mustReceive(t, m, lines[2:8], 8) // sent again
	mustReceive(t, m, [][]byte{bytes.TrimSuffix(lines[8], []byte("\n"))}, 9)
	m.Close()
	m = mirrorAt(t, path)
	mustReceive(t, m, lines[:20], 20)
	m.Close()

	b := mustRead(t, path)
	if err := os.WriteFile(path, b[:len(b)-9], 0o600); err != nil {
		t.Fatal(err)
	}
	m = mirrorAt(t, path) // without the torn record, and without one of its own
	if seq, _ := m.Head(); seq != 19 {
		t.Fatalf("copy ends with record %d", seq)
	}
	mustReceive(t, m, lines[19:], 30)
	rep := mustVerify(t, path, 30)
	if rep.Gaps != 0 {
		t.Errorf("the copy has %d records of its own", rep.Gaps)
	}
	names, err := Segments(path)
	if err != nil || len(names) < 3 {
		t.Fatal(names, err)
	}
	var all []byte
	for _, n := range names {
		all = append(all, mustRead(t, n)...)
	}
	if !bytes.Equal(all, bytes.Join(lines, nil)) {
		t.Error("the copy differs")
	}
}

func TestMirrorRefuses(t *testing.T) {
	lines, other := linesOf(t, 6), linesOf(t, 6)
	for name, next := range map[string][]byte{
		"a record too far":       lines[4],
		"another log's record":   other[3],
		"another newest record":  other[2],
		"a line that is changed": bytes.Replace(lines[3], []byte("POST"), []byte("PUT"), 1),
		"no record":              []byte("hello\n"),
		"half a line":            lines[3][:40],
		"two lines in one":       bytes.Join(lines[3:5], nil),
	} {
		m := mirrorAt(t, filepath.Join(t.TempDir(), "copy.log"))
		mustReceive(t, m, lines[:3], 3)
		err := m.Receive(t.Context(), [][]byte{next})
		if name == "a line that is changed" {
			// Only the next line can tell.
			if err == nil {
				err = m.Receive(t.Context(), lines[4:5])
			}
		}
		if err == nil {
			t.Errorf("%s was taken", name)
		}
		if name == "a record too far" && !errors.Is(err, ErrNotNext) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMirrorOfALogThatStartsAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "copy.log")
	m := mirrorAt(t, path)
	mustReceive(t, m, linesOf(t, 20), 20)
	mustReceive(t, m, linesOf(t, 5), 5)
	mustReceive(t, m, linesOf(t, 2), 2)
	mustVerify(t, path, 2)
	mustVerify(t, path+".old-1", 20)
	mustVerify(t, path+".old-2", 5)
	m.Close()
	m = mirrorAt(t, path)
	if seq, _ := m.Head(); seq != 2 {
		t.Errorf("copy ends with record %d", seq)
	}
}
