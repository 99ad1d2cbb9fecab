package audit

import (
	"bytes"
	"compress/gzip"
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

func benchLines(b *testing.B, n int) []byte {
	b.Helper()
	l := NewMemory()
	r := sample()
	for range n {
		r.Seq, r.ID, r.Time = 0, "", time.Time{}
		if err := l.Append(&r); err != nil {
			b.Fatal(err)
		}
	}
	return l.Lines()
}
