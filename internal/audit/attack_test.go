package audit

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// What Append writes, ParseLine reads: a tunnel that lived for months must not
// break the log.
func TestLongDurations(t *testing.T) {
	l := NewMemory()
	for _, d := range []time.Duration{50 * 24 * time.Hour, 1<<63 - 1, -time.Hour, -1 << 63} {
		if err := l.Append(&Record{Kind: KindEgressClose, Duration: d, BytesUp: 1<<63 - 1, BytesDown: -1 << 63}); err != nil {
			t.Fatal(err)
		}
	}
	if rep, err := Verify(bytes.NewReader(l.Lines())); err != nil || rep.Records != 4 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if got := l.Records()[0].Duration; got != 50*24*time.Hour {
		t.Errorf("a duration came back as %v", got)
	}
}

func TestRedactsInAnyCase(t *testing.T) {
	for _, s := range []string{
		"header BEARER abcdefgh12345678", "header bEaReR abcdefgh12345678", "header dpop abcdefgh12345678",
		"get http://alice:abcdefgh12345678@db.test/x", "https://abcdefgh12345678@db.test and more",
		`proxy "http://a:abcd@efgh12345678@b:80"`,
	} {
		l := NewMemory()
		if err := l.Append(&Record{Kind: KindDecision, Detail: s}); err != nil {
			t.Fatal(err)
		}
		if got := l.Records()[0].Detail; strings.Contains(got, "efgh12345678") || !strings.Contains(got, redacted) {
			t.Errorf("%q was kept as %q", s, got)
		}
	}
	for _, s := range []string{"spiffe://demo.test/ns/a to mail@host.test", "basic things", "://@"} {
		if got := redact(s); s != "://@" && got != s {
			t.Errorf("%q became %q", s, got)
		}
	}
}
