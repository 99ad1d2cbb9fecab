package mesh

import (
	"fmt"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// crowd is a folder with an entry for each of n workloads.
func crowd(n int) fstest.MapFS {
	var b strings.Builder
	b.WriteString("entries:\n")
	for i := range n {
		fmt.Fprintf(&b, "  - {spiffe_id: \"spiffe://corp.example/ns/shop/sa/workload-%d\", parent_id: \"spiffe://corp.example/spire/agent/join_token/node-%d\", selectors: [\"unix:uid:%d\", \"unix:gid:%d\"]}\n",
			i, i%100, 1000+i, 1000+i)
	}
	return fstest.MapFS{accessFile: {}, entriesFile: {Data: []byte(b.String())}}
}

// TestTenThousandWorkloadsStandInOneReviewedFile above the bound of every other
// file, and a file without bound does not.
func TestTenThousandWorkloadsStandInOneReviewedFile(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("corp.example")
	files := crowd(10_000)
	if size := len(files[entriesFile].Data); size <= MaxFile {
		t.Fatalf("the file has %d bytes, want more than %d", size, MaxFile)
	}
	p, err := ParseFS(files, td)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Entries) != 10_000 {
		t.Errorf("%d entries", len(p.Entries))
	}
	files[entriesFile].Data = append(files[entriesFile].Data, strings.Repeat("#\n", maxEntries/2)...)
	if _, err := ParseFS(files, td); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("more than %d bytes", maxEntries)) {
		t.Errorf("a larger file: %v", err)
	}
}

// TestTheCostOfAnEntryDoesNotGrowWithTheirNumber counts what is allocated: the
// clock of a machine that does other work as well says nothing.
func TestTheCostOfAnEntryDoesNotGrowWithTheirNumber(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("corp.example")
	cost := func(n int) float64 {
		files := crowd(n)
		return testing.AllocsPerRun(1, func() {
			if _, err := ParseFS(files, td); err != nil {
				t.Error(err)
			}
		}) / float64(n)
	}
	few, many := cost(500), cost(4000)
	if many > 1.5*few {
		t.Errorf("an entry among 500 costs %.0f allocations, among 4,000 %.0f", few, many)
	}
}

// BenchmarkParseEntries is the time of one entry among few and among many.
func BenchmarkParseEntries(b *testing.B) {
	td := spiffeid.RequireTrustDomainFromString("corp.example")
	for _, n := range []int{1000, 10_000} {
		files := crowd(n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				if _, err := ParseFS(files, td); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*n), "us/entry")
		})
	}
}
