package authz

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

// fleet writes a policy of n rows: services that call each other, a tenth of
// the rows by group, a tenth by pattern, with guardrails for everyone.
func fleet(n int) string {
	var b strings.Builder
	for i := range max(n/10, 50) {
		fmt.Fprintf(&b, "g, spiffe://corp.example/ns/n%d/sa/s%d, group:g%d\n", i%100, i, i%50)
	}
	fmt.Fprintln(&b, "p, guard-1, in, **, *, *, *, /admin/**, unless.src=spiffe://corp.example/ns/ops/**, deny")
	fmt.Fprintln(&b, "p, guard-2, in, spiffe://corp.example/ns/untrusted/**, *, *, *, **, -, deny")
	for i := range n - 2 {
		src := fmt.Sprintf("spiffe://corp.example/ns/n%d/sa/s%d", i%100, i%(n/10+1))
		switch i % 10 {
		case 8:
			src = fmt.Sprintf("group:g%d", i%50)
		case 9:
			src = fmt.Sprintf("spiffe://corp.example/ns/n%d/**", i%100)
		}
		dst := fmt.Sprintf("spiffe://corp.example/ns/n%d/sa/s%d", (i/7)%100, (i/7)%(n/10+1))
		fmt.Fprintf(&b, "p, row-%05d, in, %s, %s, 8443, GET|POST, /v1/r%d/**, -, allow\n", i, src, dst, i%20)
	}
	return b.String()
}

// benchCall is allowed by a row of fleet(n) in the middle.
func benchCall(t testing.TB, s *Set) *Call {
	t.Helper()
	for i := len(s.rows) / 2; i < len(s.rows); i++ {
		if r := &s.rows[i]; r.Effect == mesh.Allow && !strings.ContainsAny(r.Src, "*") && strings.HasPrefix(r.Src, "spiffe:") {
			c := &Call{Dir: mesh.In, Src: id(r.Src), Dst: r.Dst, Port: 8443, Verb: "POST", Path: strings.TrimSuffix(r.Path, "**") + "charges/42"}
			if decide(t, s, c).Allow {
				return c
			}
		}
	}
	t.Fatal("no row allows anything")
	return nil
}

func judgeWith(t testing.TB, rec Recorder, s *Set) *Judge {
	t.Helper()
	j, err := NewJudge(JudgeConfig{Audit: rec, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	j.Use(s)
	return j
}

func fileLog(t testing.TB) *audit.Log {
	t.Helper()
	l, err := audit.Open(audit.Config{Path: filepath.Join(t.TempDir(), "audit.log"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func BenchmarkJudge(b *testing.B) {
	for _, n := range []int{100, 10_000} {
		s := compile(b, fleet(n))
		c := benchCall(b, s)
		b.Run(fmt.Sprintf("strings-%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !s.Decide(c).Allow {
					b.Fatal("denied")
				}
			}
		})
		stranger := *c
		stranger.Src = id("spiffe://corp.example/ns/elsewhere/sa/unknown")
		b.Run(fmt.Sprintf("denied-%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if s.Decide(&stranger).Allow {
					b.Fatal("allowed")
				}
			}
		})
		sl := s.Slice(c.Dir, c.Src, c.Dst, c.Port)
		b.Run(fmt.Sprintf("slice-%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !sl.Decide(c).Allow {
					b.Fatal("denied")
				}
			}
		})
	}
	b.Run("recorded", func(b *testing.B) {
		s := compile(b, fleet(10_000))
		c := benchCall(b, s)
		cn := judgeWith(b, fileLog(b), s).Conn(c.Dir, c.Src, c.Dst, c.Port)
		b.ReportAllocs()
		for b.Loop() {
			if g, err := cn.Judge(c); !g.Valid() || err != nil {
				b.Fatal(err)
			}
		}
	})
	for _, n := range []int{1, 100, 10_000} {
		csv := fleet(n)
		if n == 1 {
			csv = "p, r, in, spiffe://corp.example/a, spiffe://corp.example/b, 8443, GET|POST, /v1/**, -, allow"
		}
		s := compile(b, csv)
		c := benchCall(b, s)
		b.Run(fmt.Sprintf("casbin-%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if d, err := s.Oracle(c); !d.Allow || err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkCompile(b *testing.B) {
	snap := rows(b, fleet(10_000))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Compile(snap); err != nil {
			b.Fatal(err)
		}
	}
}

func TestJudgingDoesNotAllocate(t *testing.T) {
	s := compile(t, fleet(1000))
	c := benchCall(t, s)
	unknown := *c
	unknown.Src = id("spiffe://corp.example/ns/n3/sa/unknown")
	unknown.Dst = "spiffe://corp.example/ns/n3/sa/unknown"
	sl := s.Slice(c.Dir, c.Src, c.Dst, c.Port)
	j := judgeWith(t, fileLog(t), s)
	cn := j.Conn(c.Dir, c.Src, c.Dst, c.Port)
	for name, f := range map[string]func(){
		"Decide":               func() { s.Decide(c) },
		"Decide for strangers": func() { s.Decide(&unknown) },
		"Slice.Decide":         func() { sl.Decide(c) },
		"Judge":                func() { j.Judge(c) },
		"Conn.Judge":           func() { cn.Judge(c) },
	} {
		if n := testing.AllocsPerRun(1000, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
