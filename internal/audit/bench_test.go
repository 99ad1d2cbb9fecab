package audit

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkAuditAcknowledged appends from many goroutines, each of which waits
// until its record is on the disk: what a group fsync gives.
func BenchmarkAuditAcknowledged(b *testing.B) {
	l := openAt(b, filepath.Join(b.TempDir(), "audit.log"))
	b.SetParallelism(256)
	b.RunParallel(func(pb *testing.PB) {
		r := sample()
		for pb.Next() {
			r.Seq, r.ID, r.Time = 0, "", time.Time{}
			if err := l.Append(&r); err != nil {
				b.Error(err)
				return
			}
			if err := l.Sync(b.Context()); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
}

// BenchmarkAuditRawLimit is what the disk gives without this package: one write
// and one fsync at a time, of the same bytes; and many writes to one fsync.
func BenchmarkAuditRawLimit(b *testing.B) {
	line := benchLines(b, 1)
	for _, bb := range []struct {
		name  string
		group int
	}{{"write+fsync", 1}, {"1000-writes+fsync", 1000}} {
		b.Run(bb.name, func(b *testing.B) {
			f, err := os.OpenFile(filepath.Join(b.TempDir(), "raw"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			n := 0
			for b.Loop() {
				if _, err := f.Write(line); err != nil {
					b.Fatal(err)
				}
				if n++; n%bb.group == 0 {
					if err := f.Sync(); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
		})
	}
}

// BenchmarkAuditSize verifies a log, and says how large its records are as they
// stand and compressed.
func BenchmarkAuditSize(b *testing.B) {
	const records = 10_000
	lines := benchLines(b, records)
	var small bytes.Buffer
	z := gzip.NewWriter(&small)
	if _, err := z.Write(lines); err != nil {
		b.Fatal(err)
	}
	if err := z.Close(); err != nil {
		b.Fatal(err)
	}
	n := 0
	for b.Loop() {
		if _, err := Verify(bytes.NewReader(lines)); err != nil {
			b.Fatal(err)
		}
		n += records
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "verified/s")
	b.ReportMetric(float64(len(lines))/records, "B/record")
	b.ReportMetric(float64(small.Len())/records, "gzip-B/record")
}

// BenchmarkAuditTree adds durable records to the tree and signs.
func BenchmarkAuditTree(b *testing.B) {
	l := openAt(b, filepath.Join(b.TempDir(), "audit.log"))
	tree := treeAt(b, l)
	n := 0
	for b.Loop() {
		b.StopTimer()
		mustAppend(b, l, signAfter)
		if err := l.Sync(b.Context()); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if err := tree.Update(); err != nil {
			b.Fatal(err)
		}
		n += signAfter
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "records/s")
}

// benchLines are records as a busy proxy writes them: no two have the same
// caller's port, path, trace, duration and time.
func benchLines(b *testing.B, n int) []byte {
	b.Helper()
	l := NewMemory()
	rnd := rand.New(rand.NewPCG(1, 2))
	at := time.Date(2026, 11, 27, 9, 0, 0, 0, time.UTC)
	one := func(of ...string) string { return of[rnd.IntN(len(of))] }
	for range n {
		at = at.Add(time.Duration(rnd.ExpFloat64() * float64(300*time.Microsecond)))
		r := sample()
		r.Seq, r.ID, r.Time = 0, "", at
		r.Src = fmt.Sprintf("spiffe://corp.example/ns/%s/sa/%s", one("shop", "ops", "data"), one("payment", "web", "mobile-api", "batch", "search"))
		r.Dst = "spiffe://corp.example/ns/shop/sa/" + one("billing", "stock", "mail", "users", "ledger", "quotes", "rates")
		r.Verb, r.Rule = one("GET", "GET", "GET", "POST", "PUT", "DELETE"), fmt.Sprintf("%s-%d", one("pay-bill", "read-stock", "ops"), rnd.IntN(40))
		r.Path = fmt.Sprintf("/v1/%s/%d/%s", one("charges", "orders", "items"), rnd.Uint32(), one("", "lines", "events"))
		r.Trace = fmt.Sprintf("%016x%016x", rnd.Uint64(), rnd.Uint64())
		r.Peer = fmt.Sprintf("10.%d.%d.%d:%d", rnd.IntN(4), rnd.IntN(256), rnd.IntN(256), 1024+rnd.IntN(60000))
		r.Duration = time.Duration(rnd.ExpFloat64() * float64(4*time.Millisecond))
		if rnd.IntN(20) == 0 {
			r.Decision, r.Reason, r.Rule = Deny, "no_rule", ""
		}
		if err := l.Append(&r); err != nil {
			b.Fatal(err)
		}
	}
	return l.Lines()
}
