package main

import (
	"testing"
	"time"

	"sallyport/internal/mesh"
)

func TestTheCRLIsSignedWhenDue(t *testing.T) {
	now := time.Unix(1e9, 0)
	l := &crl{}
	for _, step := range []struct {
		what     string
		after    time.Duration
		revision uint64
		entries  int
		signed   bool
	}{
		{"the first list, though empty", 0, 0, 0, true},
		{"nothing new", time.Second, 0, 0, false},
		{"a revocation", time.Second, 9, 1, true},
		{"the same", time.Second, 9, 1, false},
		{"a third of its life", crlLife / 3, 9, 1, true},
		{"the revocation has ended", time.Second, 9, 0, true},
		{"one ended as another came", time.Second, 12, 0, true},
		{"a clock set back", -time.Hour, 12, 0, true},
	} {
		now = now.Add(step.after)
		signed := l.due(step.revision, step.entries, now)
		if signed != step.signed {
			t.Errorf("%s: signed %v", step.what, signed)
		}
		if signed {
			*l = crl{step.revision, step.entries, now}
		}
	}
}

func TestCRLEntries(t *testing.T) {
	at := time.Unix(1e9, 0)
	got, err := crlEntries([]mesh.RevokedSVID{{Serial: "aff", At: at}})
	if err != nil || len(got) != 1 || got[0].Serial.Int64() != 0xaff || got[0].At != at {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := crlEntries([]mesh.RevokedSVID{{Serial: "x"}}); err == nil {
		t.Error("a serial number that is none was taken")
	}
}
