// Bench-route measures what it costs a call that its service has routes: to
// match it, and what else stands in its way before a connection is lent.
//
// Each part is measured by itself for a tenth of a second, in turn with the
// others, over and over; a figure is the median of its rounds. The figures are in
// nanoseconds and allocations a call; one in _added_ns is what a part takes more
// than another one in the same round. It prints a table and a line of JSON.
package main

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"sallyport/bench/rig"
)

// A part is one thing that is measured. Its name is that of the figures, which
// end in _ns and _allocs.
type part struct {
	name string
	// run does it b.N times.
	run func(b *testing.B)
	// free says that it must not allocate.
	free bool
	// over is the part that this one holds, with more around it.
	over string
}

// parts are in the order of the way of a call.
func parts() []part {
	return slices.Concat(matching(), lending(), translating())
}

func main() {
	testing.Init()
	rounds := flag.Int("rounds", 25, "rounds of all parts")
	only := flag.String("parts", "", "only those whose name has this in it")
	if err := flag.Set("test.benchtime", "100ms"); err != nil {
		panic(err) // testing.Init makes the flag
	}
	flag.Parse()
	all := slices.DeleteFunc(parts(), func(p part) bool { return !strings.Contains(p.name, *only) })
	if err := measure(*rounds, all); err != nil {
		fmt.Fprintf(os.Stderr, "bench-route: %v\n", err)
		os.Exit(1)
	}
}

func measure(rounds int, all []part) error {
	ns, allocs := map[string][]float64{}, map[string]float64{}
	result := rig.Result{Name: "bench-route", Figures: map[string]float64{}}
	for range rounds {
		for _, p := range all {
			r := testing.Benchmark(p.run)
			result.Cases.Tried++
			if r.N == 0 { // it failed, and has said why
				result.Cases.Failed++
				continue
			}
			result.Cases.Passed++
			ns[p.name] = append(ns[p.name], float64(r.T.Nanoseconds())/float64(r.N))
			allocs[p.name] = max(allocs[p.name], float64(r.AllocsPerOp()))
		}
	}
	fmt.Printf("median of %d rounds, one after the other\n%-36s %10s %8s\n", rounds, "a call", "ns", "allocs")
	for _, p := range all {
		n := rig.Quantile(slices.Clone(ns[p.name]), 0.5) // it sorts, and the rounds are to stay in their order
		result.Figures[p.name+"_ns"], result.Figures[p.name+"_allocs"] = n, allocs[p.name]
		fmt.Printf("%-36s %10.1f %8.0f\n", p.name, n, allocs[p.name])
		if of := ns[p.over]; len(of) > 0 && len(of) == len(ns[p.name]) {
			added := make([]float64, len(of))
			for i := range of {
				added[i] = ns[p.name][i] - of[i]
			}
			result.Figures[p.name+"_added_ns"] = rig.Quantile(added, 0.5)
			fmt.Printf("%-36s %10.1f\n", "  more than "+p.over, rig.Quantile(added, 0.5))
		}
		if p.free {
			result.Verdicts = append(result.Verdicts, rig.Verdict{Name: p.name + " allocates nothing", OK: allocs[p.name] == 0})
		}
	}
	return result.End(os.Stdout, "something failed, or allocates")
}
