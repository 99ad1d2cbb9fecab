package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/store"
)

// storedHeads keeps the heads of audit logs in the store, where every issuer
// sees them.
type storedHeads struct{ store store.Store }

// headKey is the name itself, unless it is longer than a key may be.
func headKey(name string) string {
	if len(name) <= store.MaxKey {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return "long/" + hex.EncodeToString(sum[:])
}

// Load is audit.Heads.
func (h storedHeads) Load(ctx context.Context, name string) ([]byte, int64, error) {
	r, err := h.store.Get(ctx, store.KindAuditHead, headKey(name))
	if errors.Is(err, store.ErrNotFound) {
		return nil, 0, nil
	}
	return r.Value, r.Revision, err
}

// Save is audit.Heads.
func (h storedHeads) Save(ctx context.Context, name string, head []byte, revision int64) (bool, error) {
	_, err := h.store.Write(ctx, store.Op{Kind: store.KindAuditHead, Key: headKey(name), Value: head, IfRevision: &revision})
	if errors.Is(err, store.ErrConflict) {
		return false, nil
	}
	return err == nil, err
}

// Keys in the store that are no heads begin with witnessKeys.
const witnessKeys = "witness/"

// witness cosigns the audit logs of proxies and of the issuer itself, and
// raises the alarm when one is not what was cosigned.
type witness struct {
	in   *issuer
	w    *audit.Witness
	tree *audit.Tree // of the issuer's own log

	mu   sync.Mutex // guards told
	told map[string]time.Time
}

// openWitness opens the key, tells the store of it, and puts it into a file for
// who verifies.
func (in *issuer) openWitness(ctx context.Context) error {
	w, err := audit.OpenWitness(in.cfg.DataDir, storedHeads{in.store})
	if err != nil {
		return err
	}
	tree, err := audit.OpenTree(in.audit)
	if err != nil {
		return err
	}
	in.witness = &witness{in: in, w: w, tree: tree, told: map[string]time.Time{}}
	if _, err := in.store.Write(ctx, store.Op{Kind: store.KindAuditHead, Key: witnessKeys + w.Key(), Value: []byte(w.Key())}); err != nil {
		return fmt.Errorf("tell other issuers the key of the audit witness: %w", err)
	}
	return daemon.WriteFile(filepath.Join(in.cfg.DataDir, "witness.vkey"), []byte(w.Key()+"\n"), 0o644)
}

// Heads is control.Witness.
func (w *witness) Heads(ctx context.Context) (out control.AuditHeads, err error) {
	for after := ""; ; {
		rs, err := w.in.store.List(ctx, store.KindAuditHead, after, 0)
		if err != nil || len(rs) == 0 {
			return out, err
		}
		for _, r := range rs {
			after = r.Key
			if strings.HasPrefix(r.Key, witnessKeys) {
				out.Witnesses = append(out.Witnesses, string(r.Value))
			} else {
				out.Heads = append(out.Heads, r.Value)
			}
		}
	}
}

// signed is what all issuers have signed last.
func (w *witness) signed(ctx context.Context) (out []audit.Head, err error) {
	all, err := w.Heads(ctx)
	for _, b := range all.Heads {
		h, e := audit.ParseHead(b)
		err = errors.Join(err, e)
		out = append(out, h)
	}
	return out, err
}

// Cosign is control.Witness.
func (w *witness) Cosign(ctx context.Context, agent, workload spiffeid.ID, q control.CosignRequest) (control.CosignReply, error) {
	return w.cosign(ctx, audit.LogName(workload, agent), workload.String(), agent.String(), q)
}

func (w *witness) cosign(ctx context.Context, name, src, peer string, q control.CosignRequest) (control.CosignReply, error) {
	signed, have, err := w.w.Cosign(ctx, name, audit.CosignRequest(q))
	out := control.CosignReply{Signed: signed, Have: have}
	switch {
	case err == nil, errors.Is(err, audit.ErrTooSoon):
		return out, nil
	case errors.Is(err, audit.ErrCut):
		out.Contradiction = control.LogCut
	case errors.Is(err, audit.ErrForked):
		out.Contradiction = control.LogForked
	case errors.Is(err, audit.ErrOtherLog):
		out.Contradiction = control.LogOther
	case errors.Is(err, audit.ErrWrongName):
		out.Contradiction = control.LogForeign
	default:
		return out, err
	}
	return out, w.alarm(name, src, peer, out.Contradiction, err)
}

// Run brings the issuer's own checkpoints to the store.
func (w *witness) Run(ctx context.Context) error {
	name := audit.IssuerLogName(w.in.cfg.TrustDomain, cmp.Or(w.in.name, "issuer"))
	var have uint64
	for failed := false; ctx.Err() == nil; daemon.Pause(ctx, time.Second) {
		if w.tree.Size() == have {
			continue
		}
		next, err := w.own(ctx, name, have)
		if err != nil && ctx.Err() == nil && !failed {
			w.in.log.Error("checkpoint of the issuer's own audit log not kept in the store; trying again", "err", err)
		}
		have, failed = next, err != nil
	}
	return nil
}

func (w *witness) own(ctx context.Context, name string, have uint64) (uint64, error) {
	for range 2 {
		q, ok, err := w.tree.Ask(name, have)
		if err != nil || !ok {
			return have, err
		}
		r, err := w.cosign(ctx, name, name, "", control.CosignRequest(q))
		if err != nil {
			return have, err
		}
		if have = r.Have; len(r.Signed) > 0 {
			return have, w.tree.Cosigned(name, r.Signed)
		}
	}
	return have, nil
}

// alarmApart is how often one proxy's contradiction is recorded.
const alarmApart = time.Minute

// maxAlarms bounds what is remembered of alarms; an agent speaks only for
// workloads that it has entries for.
const maxAlarms = 10_000

func (w *witness) alarm(name, src, peer string, what control.Contradiction, cause error) error {
	now := time.Now()
	w.mu.Lock()
	last := w.told[name]
	if len(w.told) >= maxAlarms {
		clear(w.told)
	}
	due := now.Sub(last) >= alarmApart || what == control.LogOther
	if due {
		w.told[name] = now
	}
	w.mu.Unlock()
	if !due {
		return nil
	}
	w.in.log.Error("ALARM: an audit log is not the one that was cosigned", "log", name, "what", string(what), "err", cause)
	return w.in.audit.Append(&audit.Record{
		Kind: audit.KindGap, Decision: audit.Deny, Src: src, Peer: peer, Reason: "log_" + string(what), Detail: cause.Error(),
	})
}
