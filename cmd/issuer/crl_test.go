package main

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport/internal/mesh"
)

func TestCRLHoldsBannedAgentsAndIsSignedWhenDue(t *testing.T) {
	now := time.Unix(1e9, 0)
	agents := []mesh.Agent{
		{Serial: "1", ExpiresAt: now.Add(time.Hour)},
		{Serial: "2", NextSerial: "3", ExpiresAt: now.Add(time.Hour), Banned: true},
		{Serial: "4", ExpiresAt: now, Banned: true},
	}
	got := revokedOf(agents, now)
	if d := cmp.Diff([]string{"2", "3"}, got); d != "" {
		t.Error(d)
	}
	l := &crl{}
	for _, step := range []struct {
		what    string
		after   time.Duration
		serials []string
		signed  bool
	}{
		{"the first list, though empty", 0, nil, true},
		{"nothing new", time.Second, nil, false},
		{"a ban", time.Second, got, true},
		{"the same", time.Second, got, false},
		{"a third of its life", crlLife / 3, got, true},
		{"the ban has expired", time.Second, nil, true},
		{"a clock set back", -time.Hour, nil, true},
	} {
		now = now.Add(step.after)
		signed := l.take(step.serials, now)
		if signed != step.signed {
			t.Errorf("%s: signed %v", step.what, signed)
		}
		if signed {
			l.made = now
		}
	}
	l.since = map[string]time.Time{"x": now}
	if _, err := l.revoked(); err == nil {
		t.Error("a serial number that is none was taken")
	}
}
