package audit

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestStartingAgainGetsRidOfNothing: a proxy that sends other records than it has
// had cosigned, and then begins another log, is not rid of what it sent when
// that is old, though its head is forgotten. Who has had its log cosigned, or
// lost one before it was, is.
func TestStartingAgainGetsRidOfNothing(t *testing.T) {
	for _, tt := range []struct {
		name string
		// sent is what came of the log that was cosigned, and what came after it.
		sent func(signed [][]byte) [][][]byte
		kept bool
	}{
		{"other records than were cosigned", func([][]byte) [][][]byte { return [][][]byte{linesOf(t, 60)} }, true},
		{"the records that were cosigned", func(b [][]byte) [][][]byte { return [][][]byte{b} }, false},
		{"fewer than were cosigned", func(b [][]byte) [][][]byte { return [][][]byte{b[:40]} }, false},
		{"a log that was lost before it was cosigned", func(b [][]byte) [][][]byte { return [][][]byte{b, linesOf(t, 60)} }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSignedLog(t)
				s.grow(t, 50)
				s.cosign(t)
				heads := s.trust(t).Heads
				var signed [][]byte
				for b := range bytes.Lines(mustRead(t, s.path)) {
					signed = append(signed, b)
				}
				path := filepath.Join(t.TempDir(), CopyName(billingID, nodeID))
				m, err := OpenMirror(Config{
					Path: path, Log: quiet(), MaxFile: 3000,
					Heads: func(context.Context) ([]Head, error) { return heads, nil },
				})
				if err != nil {
					t.Fatal(err)
				}
				defer m.Close()
				sent := tt.sent(signed)
				for _, lines := range sent {
					mustReceive(t, m, lines, uint64(len(lines)))
				}
				mustReceive(t, m, linesOf(t, 5), 5)
				old := path + endedMark + strconv.Itoa(len(sent))
				written(t, old)
				time.Sleep(2 * time.Hour)
				o := mirrorAt(t, old)
				into := openAt(t, filepath.Join(t.TempDir(), "audit.jsonl"))
				err = o.Sweep(t.Context(), KeepConfig{Age: time.Hour, WithoutSink: true}, s.w, nil, into)
				if tt.kept != (err != nil && strings.Contains(err.Error(), "not the log that was cosigned")) || !tt.kept && err != nil {
					t.Errorf("kept must be %v: %v", tt.kept, err)
				}
				if _, err := os.Stat(old + keptSuffix); (err != nil) != tt.kept {
					t.Errorf("evidence of a removal: %v", err)
				}
			})
		})
	}
}
