package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// policyStatus is "sallyport policy status".
func (c *cli) policyStatus() *cobra.Command {
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "status", Short: "Show which proxies act on the policies in force", Args: cobra.NoArgs,
		Long: "Show which proxies act on the policies in force. One that refuses them, or an edit\n" +
			"that the issuer refuses, is a failure. With --wait, wait until every connected\n" +
			"proxy acts on them; the end of --timeout is a failure, too.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if timeout <= 0 {
				return usage(fmt.Errorf("--timeout %s is too short: write a time such as 30s", timeout))
			}
			var d distribution
			err := c.with(cmd, "sallyport status", func(ctx context.Context, a *control.Admin) (err error) {
				d, err = awaitPolicies(ctx, a, wait, timeout, 0)
				return err
			})
			if err == nil {
				err = c.emitDistribution(d)
			}
			if err == nil && (wait || d.refused()) {
				err = d.failure(timeout)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until every connected proxy acts on them")
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	return cmd
}

// A distribution is how far the policies in force have come.
type distribution struct {
	Revision uint64 `json:"revision"`
	Hash     string `json:"hash"`
	// Set is the hash of the set that was pushed, NextRevision that of the next.
	Set          string `json:"set,omitempty"`
	NextRevision uint64 `json:"next_revision,omitempty"`
	// Rollout is what a canary group tries, or tried last.
	Rollout *mesh.Rollout `json:"rollout,omitempty"`
	// tried is the revision of the rollout that is waited for, 0 for none.
	tried uint64
	// Refused is why the newest edit is not in force.
	Refused string `json:"refused,omitempty"`
	// Connected proxies have acknowledged the revision, have refused it, or have
	// not answered yet.
	Connected int          `json:"connected"`
	Acked     int          `json:"acked"`
	Nacked    int          `json:"nacked"`
	Waiting   int          `json:"waiting"`
	Proxies   []mesh.Proxy `json:"proxies"`
}

func distributed(st mesh.IssuerStatus, ps []mesh.Proxy) distribution {
	d := distribution{
		Revision: st.PolicyRevision, Hash: st.PolicyHash, Set: st.PolicySet, NextRevision: st.NextRevision, Rollout: st.Rollout,
		Refused: st.LastRefusal, Proxies: ps,
	}
	for _, p := range ps {
		if !p.Connected {
			continue
		}
		d.Connected++
		switch p.State {
		case mesh.Synced:
			d.Acked++
		case mesh.Rejected:
			d.Nacked++
		default:
			d.Waiting++
		}
	}
	return d
}

// refused reports whether somebody refuses what is to be in force, for which
// nobody has to wait.
func (d distribution) refused() bool { return d.Refused != "" || d.Nacked > 0 }

// settled reports whether waiting longer would tell nothing new.
func (d distribution) settled() bool {
	if ro := d.Rollout; d.tried > 0 && ro.Active() && ro.Revision == d.tried {
		// The issuer decides, unless only an operator does.
		return ro.State == mesh.Held || ro.Bake == 0 && (d.Nacked > 0 || d.Waiting == 0)
	}
	return d.refused() || d.Waiting == 0
}

// awaitPolicies asks once, or until the distribution has settled or the time is
// over: what is tried has the time of its bake beside. Tried is the revision of
// the rollout that is waited for; 0 is the one that is under way, if any.
func awaitPolicies(ctx context.Context, a *control.Admin, wait bool, timeout time.Duration, tried uint64) (distribution, error) {
	for start := time.Now(); ; {
		// The proxies before the issuer: their states are then of its revision,
		// or of an older one and looked at again.
		ps, err := a.Proxies(ctx)
		if err != nil {
			return distribution{}, err
		}
		st, err := a.Status(ctx)
		if err != nil {
			return distribution{}, err
		}
		d := distributed(st, ps)
		if d.Rollout.Active() && tried == 0 {
			tried = d.Rollout.Revision
		}
		end := start.Add(timeout)
		if d.tried = tried; d.tried > 0 && d.Rollout != nil && d.Rollout.Revision == d.tried {
			end = end.Add(d.Rollout.Bake)
		}
		if !wait || d.settled() && d.of(ps) || !time.Now().Before(end) {
			return d, nil
		}
		select {
		case <-ctx.Done():
			return d, ctx.Err()
		case <-time.After(askEvery):
		}
	}
}

// of reports whether those who acknowledged have done so for this revision: an
// edit may have come between the two questions.
func (d distribution) of(ps []mesh.Proxy) bool {
	for _, p := range ps {
		want := d.Revision
		if p.Group == mesh.GroupCanary && d.Rollout.Active() {
			want = d.Rollout.Revision
		}
		if p.Connected && p.State == mesh.Synced && p.PolicyRevision != want {
			return false
		}
	}
	return true
}

// failure is why the policies are not in force everywhere, nil when they are.
func (d distribution) failure(timeout time.Duration) error {
	var who []string
	for _, p := range d.Proxies {
		switch {
		case !p.Connected:
		case d.Nacked > 0 && p.State == mesh.Rejected:
			who = append(who, fmt.Sprintf("%s keeps revision %d: %s", p.Workload, p.PolicyRevision, p.Reason))
		case d.Nacked == 0 && p.State != mesh.Synced:
			who = append(who, p.Workload.String())
		}
	}
	err := error(nil)
	refused := d.Revision
	if ro := d.Rollout; d.tried > 0 && ro != nil && ro.Revision == d.tried {
		if err = outcome(ro); err != nil {
			return failed(err)
		}
		if ro.Active() {
			refused = ro.Revision
		}
	}
	switch {
	case d.Refused != "":
		err = daemon.Hint(fmt.Errorf("the issuer refuses the newest edit, revision %d stays in force: %s", d.Revision, firstLine(d.Refused)), "sallyport policy test DIR")
	case d.Nacked > 0:
		err = daemon.Hint(fmt.Errorf("%d of %d connected proxies refuse revision %d: %s", d.Nacked, d.Connected, refused, strings.Join(who, "; ")), "mend the row, or put the former policies back")
	case d.Waiting > 0:
		err = daemon.Hint(fmt.Errorf("%d of %d connected proxies do not act on revision %d after %s: %s", d.Waiting, d.Connected, d.Revision, timeout, strings.Join(who, ", ")), "look at the logs of these proxies")
	case d.Revision == 0:
		err = errors.New("no policies are in force")
	}
	return failed(err)
}

func (c *cli) emitDistribution(d distribution) error {
	rows := make([][]string, 0, len(d.Proxies))
	for _, p := range d.Proxies {
		answer, seen := "no answer yet", "now"
		switch p.State {
		case mesh.Synced:
			answer = "ack"
			if p.Verified {
				answer = "ack, signatures counted"
			}
		case mesh.Rejected:
			answer = "nack: " + firstLine(p.Reason)
		}
		if !p.Connected {
			seen = age(time.Since(p.LastSeen)) + " ago"
		}
		since := "-"
		if !p.Since.IsZero() {
			since = age(time.Since(p.Since))
		}
		rows = append(rows, []string{
			p.Workload.String(), p.Kind, cmp.Or(p.Group, "-"), strconv.FormatUint(cmp.Or(p.Wanted, d.Revision), 10), strconv.FormatUint(p.PolicyRevision, 10),
			cmp.Or(fmt.Sprintf("%.12s", p.PolicyHash), "-"), since, seen, answer,
		})
	}
	if c.format == "table" {
		fmt.Fprintf(c.stdout, "revision %d, hash %.12s: %d connected proxies, %d ack, %d nack, %d without an answer\n", d.Revision, d.Hash, d.Connected, d.Acked, d.Nacked, d.Waiting)
		if d.Rollout != nil {
			fmt.Fprintln(c.stdout, rolloutLine(d.Rollout, time.Now()))
		}
		if d.Refused != "" {
			fmt.Fprintf(c.stdout, "the newest edit was REFUSED, revision %d stays in force:\n%s\n", d.Revision, indent(d.Refused))
		}
		fmt.Fprintln(c.stdout)
	}
	return c.emit(d, []string{"IDENTITY", "KIND", "GROUP", "WANTED", "HAS", "HASH", "SINCE", "SEEN", "ANSWER"}, rows)
}
