package svid

import (
	"bytes"
	"io"
	"net"
	"slices"
	"testing"
)

func frame(typ, flags byte, payload []byte) []byte {
	return append([]byte{0, byte(len(payload) >> 8), byte(len(payload)), typ, flags, 0, 0, 0, 0}, payload...)
}

func TestFramesAreFollowedHoweverTheyAreCut(t *testing.T) {
	stream := slices.Concat(make([]byte, prefaceLen), frame(4, 0, make([]byte, 18)), frame(pingType, 0, []byte("notanack")),
		frame(0, 0, frame(pingType, ackFlag, []byte("in a bod"))), frame(pingType, ackFlag, []byte("answer01")), frame(4, 1, nil))
	for size := 1; size <= len(stream); size++ {
		f := frames{skip: prefaceLen}
		var got []string
		for part := range slices.Chunk(stream, size) {
			f.walk(part, func(d [pingLen]byte) { got = append(got, string(d[:])) })
		}
		if !slices.Equal(got, []string{"answer01"}) || !f.whole() {
			t.Fatalf("cut every %d bytes: %q, whole %v", size, got, f.whole())
		}
	}
}

func TestChallengeIsSentOnceAndOnlyItsAnswerCounts(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	h := challenge(a)
	defer h.Close()
	settings := frame(4, 0, make([]byte, 12))
	go func() {
		for _, part := range [][]byte{settings[:5], settings[5:], settings} {
			if n, err := h.Write(part); n != len(part) || err != nil {
				t.Errorf("Write = %d, %v; want %d", n, err, len(part))
			}
		}
	}()
	got := make([]byte, 2*len(settings)+frameHeader+pingLen)
	if _, err := io.ReadFull(b, got); err != nil {
		t.Fatal(err)
	}
	if want := slices.Concat(settings, frame(pingType, 0, h.secret[:]), settings); !bytes.Equal(got, want) {
		t.Fatalf("server sent %x, want %x", got, want)
	}
	wrong := h.secret
	wrong[7] ^= 1
	for _, c := range []struct {
		send   []byte
		proven bool
	}{
		{make([]byte, prefaceLen), false},
		{frame(pingType, ackFlag, wrong[:]), false},
		{frame(pingType, 0, h.secret[:]), false},
		{frame(0, 0, frame(pingType, ackFlag, h.secret[:])), false},
		{frame(pingType, ackFlag, h.secret[:]), true},
		{frame(pingType, ackFlag, h.secret[:]), true},
	} {
		go b.Write(c.send)
		if _, err := io.ReadFull(h, make([]byte, len(c.send))); err != nil {
			t.Fatal(err)
		}
		select {
		case <-h.proven:
			if !c.proven {
				t.Errorf("%x counted as the answer", c.send)
			}
		default:
			if c.proven {
				t.Error("the answer did not count")
			}
		}
	}
}

func FuzzFrames(f *testing.F) {
	f.Add(frame(pingType, ackFlag, []byte("answer01")), uint8(3))
	f.Fuzz(func(t *testing.T, b []byte, cut uint8) {
		collect := func(size int) (out []string) {
			f := frames{}
			for part := range slices.Chunk(b, size) {
				f.walk(part, func(d [pingLen]byte) { out = append(out, string(d[:])) })
			}
			return out
		}
		if one, cuts := collect(max(1, len(b))), collect(int(cut)+1); !slices.Equal(one, cuts) {
			t.Errorf("whole %q, cut %q", one, cuts)
		}
	})
}
