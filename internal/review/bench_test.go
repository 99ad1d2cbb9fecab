package review

import (
	"fmt"
	"strings"
	"testing"
)

func BenchmarkLint10000Rows(b *testing.B) {
	var csv strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&csv, "p, r-%d, in, $td/ns/shop/sa/c%d, $td/ns/shop/sa/s%d, 8443, GET, /v1/a%d/**, -, allow\n", i, i%97, i%500, i%7)
	}
	p := parse(b, csv.String(), "")
	for b.Loop() {
		Lint(p, now)
	}
}
