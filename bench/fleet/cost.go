package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"sallyport/bench/rig"
)

// messages is the issuer's count of what reached it, by method: one for a call
// with one request, each for a stream.
const messages = "sallyport_issuer_messages_total"

// A cost is the CPU time of the issuer and of this process, the load.
type cost struct{ issuer, load time.Duration }

func costNow(iss *rig.Issuer) (cost, error) {
	i, err := iss.CPU()
	if err != nil {
		return cost{}, err
	}
	own, err := rig.OwnCPU()
	return cost{i, own}, err
}

func (c cost) since(before cost) cost { return cost{c.issuer - before.issuer, c.load - before.load} }

func (c cost) plus(d cost) cost { return cost{c.issuer + d.issuer, c.load + d.load} }

// share is the part of both that the issuer computed.
func (c cost) share() float64 {
	return c.issuer.Seconds() / max(0.01, (c.issuer+c.load).Seconds())
}

// received sums up what reached the issuer over mutual TLS so far. Every
// message counts, so that one on a long stream is as good as a call.
func received(ctx context.Context, iss *rig.Issuer) (all float64, by map[string]float64, err error) {
	by, err = iss.Metric(ctx, messages)
	for _, n := range by {
		all += n
	}
	return all, by, err
}

// idle watches the fleet while nothing changes and counts what reaches the
// issuer.
func (s settings) idle(ctx context.Context, w io.Writer, iss *rig.Issuer, res *rig.Result) error {
	before, byBefore, err := received(ctx, iss)
	if err != nil {
		return err
	}
	start, spent := time.Now(), cost{}
	if spent, err = costNow(iss); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(s.watch):
	}
	after, byAfter, err := received(ctx, iss)
	if err != nil {
		return err
	}
	now, err := costNow(iss)
	if err != nil {
		return err
	}
	took := time.Since(start)
	rate := (after - before) / float64(s.n) / took.Minutes()
	spent = now.since(spent)
	res.Figures["idle_rpc_per_proxy_min"], res.Figures["idle_window_s"] = rate, took.Seconds()
	res.Figures["idle_issuer_cpu_percent"] = 100 * spent.issuer.Seconds() / took.Seconds()
	fmt.Fprintf(w, "idle for %.0f s: %.0f messages reached the issuer, %.2f for each proxy a minute; the issuer computed %.1f %% of a core\n",
		took.Seconds(), after-before, rate, res.Figures["idle_issuer_cpu_percent"])
	for method, n := range byAfter {
		if n -= byBefore[method]; n > 0 {
			fmt.Fprintf(w, "  %s: %.0f\n", method, n)
		}
	}
	res.Verdicts = append(res.Verdicts, rig.Verdict{Name: "an idle proxy asks at most once a minute", OK: rate <= 1})
	return nil
}
