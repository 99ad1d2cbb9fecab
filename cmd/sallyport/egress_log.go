package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// A way is from a workload to a host outside.
type way struct {
	Src  string `json:"src"`
	Dst  string `json:"dst"`
	Port uint16 `json:"port"`
}

func wayOf(r *audit.Record) way { return way{r.Src, r.Dst, r.Port} }

func (w way) compare(v way) int {
	return cmp.Or(strings.Compare(w.Src, v.Src), strings.Compare(w.Dst, v.Dst), cmp.Compare(w.Port, v.Port))
}

// to is the destination as CONNECT has it.
func (w way) to() string {
	host := strings.TrimPrefix(w.Dst, "host:")
	if w.Port == 0 {
		return host
	}
	return net.JoinHostPort(host, strconv.Itoa(int(w.Port)))
}

// A refusedWay is what was refused of a way.
type refusedWay struct {
	way
	Count uint64    `json:"count"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
	// Reason, ID and Detail are of the last refusal.
	Reason string `json:"reason"`
	ID     string `json:"id,omitempty"`
	Detail string `json:"detail,omitempty"`
	// Allow is the command that would allow it, empty when no row can.
	Allow string `json:"allow,omitempty"`
}

// egressDenied is "sallyport egress denied".
func (c *cli) egressDenied() *cobra.Command {
	f := filterFlags{since: "24h"}
	cmd := &cobra.Command{
		Use: "denied FILE|DIR", Short: "Show what was refused on the way out, and what would allow it", Args: cobra.ExactArgs(1),
		Long: "Show what was refused on the way out, from audit logs of gateways and sidecars or\n" +
			"from the issuer's copies of them, by workload and destination, the newest last.\n" +
			"Where a row was missing, the line below would allow it, for people to review.",
		RunE: func(_ *cobra.Command, args []string) error {
			all := map[way]*refusedWay{}
			err := eachOut(args[0], &f, func(r *audit.Record) {
				if r.Decision != audit.Deny || r.Dst == "" {
					return
				}
				w := all[wayOf(r)]
				if w == nil {
					w = &refusedWay{way: wayOf(r), First: r.Time}
					all[w.way] = w
				}
				w.Count += max(1, r.Count)
				if w.First.After(r.Time) {
					w.First = r.Time
				}
				if !w.Last.After(r.Time) {
					w.Last, w.Reason, w.ID, w.Detail = r.Time, r.Reason, r.ID, r.Detail
				}
			})
			if err != nil {
				return err
			}
			return c.printDenied(slices.SortedFunc(maps.Values(all), func(a, b *refusedWay) int {
				return cmp.Or(a.Last.Compare(b.Last), a.compare(b.way))
			}))
		},
	}
	f.window(cmd)
	return cmd
}

func (c *cli) printDenied(list []*refusedWay) error {
	rows := make([][]string, 0, len(list))
	for _, w := range list {
		if w.Reason == string(authz.NoRow) && w.Port != 0 {
			w.Allow = fmt.Sprintf("sallyport egress allow %s %s --policies DIR --until 720h --reason WHY", w.Src, w.to())
		}
		rows = append(rows, []string{w.Last.UTC().Format(time.RFC3339), w.Src, w.to(), fmt.Sprint(w.Count), w.Reason, w.ID})
	}
	if err := c.emit(list, []string{"LAST", "WORKLOAD", "DESTINATION", "TIMES", "REASON", "ID"}, rows); err != nil || c.format == "json" {
		return err
	}
	for _, w := range list {
		if w.Allow != "" {
			fmt.Fprintln(c.stdout, w.Allow)
		}
	}
	return nil
}

// A ledgerLine is what went one way.
type ledgerLine struct {
	way
	Tunnels uint64    `json:"tunnels"`
	Up      int64     `json:"bytes_up"`
	Down    int64     `json:"bytes_down"`
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
}

// egressLedger is "sallyport egress ledger".
func (c *cli) egressLedger() *cobra.Command {
	var f filterFlags
	cmd := &cobra.Command{
		Use: "ledger FILE|DIR", Short: "Show who went where, with how many bytes, since when", Args: cobra.ExactArgs(1),
		Long: "Show who went where, with how many bytes, since when, from audit logs of gateways\n" +
			"or from the issuer's copies of them. Bytes count when a tunnel has ended.",
		RunE: func(_ *cobra.Command, args []string) error {
			all := map[way]*ledgerLine{}
			err := eachOut(args[0], &f, func(r *audit.Record) {
				if r.Kind != audit.KindEgressOpen && r.Kind != audit.KindEgressClose {
					return
				}
				l := all[wayOf(r)]
				if l == nil {
					l = &ledgerLine{way: wayOf(r), First: r.Time}
					all[l.way] = l
				}
				if r.Kind == audit.KindEgressOpen {
					l.Tunnels++
				}
				l.Up += r.BytesUp
				l.Down += r.BytesDown
				if r.Time.Before(l.First) {
					l.First = r.Time
				}
				if r.Time.After(l.Last) {
					l.Last = r.Time
				}
			})
			if err != nil {
				return err
			}
			list := slices.SortedFunc(maps.Values(all), func(a, b *ledgerLine) int { return a.compare(b.way) })
			rows := make([][]string, 0, len(list))
			for _, l := range list {
				rows = append(rows, []string{l.Src, l.to(), fmt.Sprint(l.Tunnels), fmt.Sprint(l.Up), fmt.Sprint(l.Down), l.First.UTC().Format(time.RFC3339), l.Last.UTC().Format(time.RFC3339)})
			}
			return c.emit(list, []string{"WORKLOAD", "DESTINATION", "TUNNELS", "UP", "DOWN", "FIRST", "LAST"}, rows)
		},
	}
	f.window(cmd)
	return cmd
}

// window adds the flags that say of whom, where to and when.
func (f *filterFlags) window(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.Src, "src", "", "SPIFFE ID of the caller; * at the end for any end")
	fl.StringVar(&f.Dst, "dst", "", "host:NAME; * at the end for any end")
	fl.StringVar(&f.since, "since", f.since, "time like 2026-01-02T15:04:05Z, or a duration like 10m before now")
	fl.StringVar(&f.until, "until", "", "as --since; not included")
}

// eachOut calls fn with the records about the way out that a filter picks.
func eachOut(path string, f *filterFlags, fn func(*audit.Record)) error {
	if err := f.parse(time.Now()); err != nil {
		return err
	}
	paths, err := copies(path)
	for _, p := range paths {
		err = errors.Join(err, audit.Each(p, func(_ []byte, r *audit.Record) error {
			if r.Dir == string(mesh.Out) && f.Match(r) {
				fn(r)
			}
			return nil
		}))
	}
	if err != nil {
		return usage(err)
	}
	return nil
}
