package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"sallyport/bench/rig"
	"sallyport/internal/mesh"
)

// profiled is how long the issuer is profiled from the first edit on: less than
// the edits take.
const profiled = 8 * time.Second

// asked is how long after the last proxy said so the issuer is asked for its
// record of the acks.
const asked = 300 * time.Millisecond

// measure brings the fleet up and edits.
func (s settings) measure(ctx context.Context, w io.Writer, res *rig.Result) error {
	iss, err := rig.Start(ctx, rig.Config{Program: s.program, Files: s.files(), Pushed: s.push, Pprof: s.profile != ""})
	if err != nil {
		return err
	}
	defer iss.Close()
	f := &fleet{took: make(chan taken, s.n)}
	start := time.Now()
	if err := s.join(ctx, iss, f); err != nil {
		return fmt.Errorf("%w\n%s", err, iss.Log())
	}
	res.Figures["join_s"] = time.Since(start).Seconds()
	fmt.Fprintf(w, "joined: %d nodes in %.1f s\n", s.n, time.Since(start).Seconds())

	sub, end := context.WithCancel(ctx)
	defer f.running.Wait()
	defer end()
	start = time.Now()
	slots := make(chan struct{}, dialers)
	f.running.Go(func() {
		for _, p := range f.proxies {
			select {
			case <-sub.Done():
				return
			case slots <- struct{}{}:
				p.follow(sub, s, func() { <-slots })
			}
		}
	})
	up, last, err := f.collect(ctx, 0, start)
	if err != nil {
		return err
	}
	upS := time.Since(start).Seconds()
	if _, err := f.confirmed(ctx, iss, last, start); err != nil {
		return err
	}
	rss, err := iss.RSS()
	if err != nil {
		return err
	}
	res.Figures["streams_up_s"], res.Figures["rss_mb"] = upS, rss
	res.Cases.Tried, res.Cases.Passed = int64(len(up)), int64(len(up))
	fmt.Fprintf(w, "streams: %d up, each with its first snapshot, in %.1f s; RSS of the issuer %.0f MB\n", len(up), upS, rss)
	if s.profile != "" {
		f.running.Go(func() {
			if err := iss.Profile(sub, s.profile, profiled); err != nil {
				fmt.Fprintf(w, "profile: %v\n", err)
			}
		})
	}
	for _, kind := range []struct{ figure, what string }{{"push", "every row"}, {"push_one_row", "one row"}} {
		if last, err = s.edit(ctx, w, iss, f, res, last, kind.figure, kind.what); err != nil {
			return err
		}
	}
	if s.watch > 0 {
		if err := s.idle(ctx, w, iss, res); err != nil {
			return err
		}
	}
	if rss, err = iss.RSS(); err != nil {
		return err
	}
	res.Figures["rss_after_edits_mb"], res.Figures["syncs"] = rss, float64(f.syncs.Load())
	v := rig.Verdict{Name: "no stream was lost and no call refused", OK: f.faults.Load() == 0}
	if e := f.fault.Load(); e != nil {
		v.Detail = fmt.Sprintf("%d faults, the first: %v", f.faults.Load(), *e)
	}
	res.Verdicts = append(res.Verdicts, v)
	fmt.Fprintf(w, "issuer: RSS %.0f MB after the edits; %d fetches of entries; %d faults\n", rss, f.syncs.Load(), f.faults.Load())
	return nil
}

// join attests all nodes.
func (s settings) join(ctx context.Context, iss *rig.Issuer, f *fleet) error {
	f.proxies = make([]*proxy, s.n)
	errs := make(chan error, joiners)
	var wg sync.WaitGroup
	for j := range joiners {
		wg.Go(func() {
			for n := j; n < s.n; n += joiners {
				c, err := iss.Join(ctx, nodeName(n))
				if err != nil {
					errs <- fmt.Errorf("join %s: %w", nodeName(n), err)
					return
				}
				f.proxies[n] = &proxy{n: n, client: c, fleet: f, sync: make(chan struct{}, 1)}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

// collect waits until every proxy has a revision after the given one, and
// returns how long each took, ms, and the revision.
func (f *fleet) collect(ctx context.Context, after uint64, start time.Time) (took []float64, revision uint64, err error) {
	seen := make([]bool, len(f.proxies))
	for len(took) < len(f.proxies) {
		select {
		case <-ctx.Done():
			return nil, 0, fmt.Errorf("%d of %d proxies have the policy: %w", len(took), len(f.proxies), ctx.Err())
		case t := <-f.took:
			if t.revision <= after || seen[t.proxy] {
				continue
			}
			seen[t.proxy] = true
			revision = t.revision
			took = append(took, float64(t.at.Sub(start).Microseconds())/1000)
		}
	}
	return took, revision, nil
}

// confirmed waits until the issuer has the ack of every proxy, and returns how
// long after start each reached it, ms.
func (f *fleet) confirmed(ctx context.Context, iss *rig.Issuer, revision uint64, start time.Time) (took []float64, err error) {
	for {
		// The issuer says when each arrived, however late it is asked; to list
		// thousands while they arrive would hold them up.
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(asked):
		}
		all, err := iss.Admin.Proxies(ctx)
		if err != nil {
			return nil, err
		}
		took = took[:0]
		for _, p := range all {
			if p.Connected && p.State == mesh.Synced && p.PolicyRevision >= revision {
				took = append(took, float64(p.LastSeen.Sub(start).Microseconds())/1000)
			}
		}
		if len(took) == len(f.proxies) {
			return took, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("the issuer has the ack of %d of %d proxies: %w", len(took), len(f.proxies), ctx.Err())
		default:
		}
	}
}

// edit changes the policy files again and again. An ack counts from the write
// of the file to the moment that the issuer has it, by the issuer's own record.
func (s settings) edit(ctx context.Context, w io.Writer, iss *rig.Issuer, f *fleet, res *rig.Result, last uint64, figure, what string) (uint64, error) {
	var have, all, slowest []float64
	var spent cost
	for e := 1; e <= s.edits; e++ {
		text := s.access(e, 0)
		if figure != "push" {
			text = s.access(s.edits, e)
		}
		before, err := costNow(iss)
		if err != nil {
			return 0, err
		}
		start := time.Now()
		if err := iss.WritePolicy("access.csv", text); err != nil {
			return 0, err
		}
		if s.push {
			if err := iss.Push(ctx); err != nil {
				return 0, err
			}
		}
		inForce, revision, err := f.collect(ctx, last, start)
		if err != nil {
			return 0, err
		}
		now, err := costNow(iss)
		if err != nil {
			return 0, err
		}
		acks, err := f.confirmed(ctx, iss, revision, start)
		if err != nil {
			return 0, err
		}
		last, spent = revision, spent.plus(now.since(before))
		have, all = append(have, inForce...), append(all, acks...)
		slowest = append(slowest, rig.Quantile(acks, 1))
	}
	res.Cases.Tried += int64(len(all))
	res.Cases.Passed += int64(len(all))
	edits := float64(s.edits)
	res.Figures[figure+"_p50_ms"], res.Figures[figure+"_p99_ms"] = rig.Quantile(all, 0.5), rig.Quantile(all, 0.99)
	res.Figures[figure+"_all_ms"] = rig.Quantile(slices.Clone(slowest), 0.5)
	res.Figures[figure+"_in_force_p99_ms"] = rig.Quantile(have, 0.99)
	res.Figures[figure+"_issuer_cpu_ms"], res.Figures[figure+"_load_cpu_ms"] = 1000*spent.issuer.Seconds()/edits, 1000*spent.load.Seconds()/edits
	res.Figures[figure+"_issuer_cpu_share"] = spent.share()
	fmt.Fprintf(w, "%d edits of %s: from the write of the file, or its push, to the ack of a proxy at the issuer p50 %.0f ms, p99 %.0f ms; to the last ack %.0f ms (median of the edits: %.0f); CPU of an edit: issuer %.0f ms, proxies %.0f ms\n",
		s.edits, what, rig.Quantile(all, 0.5), rig.Quantile(all, 0.99), res.Figures[figure+"_all_ms"], slowest, res.Figures[figure+"_issuer_cpu_ms"], res.Figures[figure+"_load_cpu_ms"])
	return last, nil
}
