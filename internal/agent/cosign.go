package agent

import (
	"context"
	"fmt"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/control"
)

const (
	// cosignEvery is how often a checkpoint that is new is brought to the
	// issuer, at most.
	cosignEvery = time.Second
	// cosignShare slows this down when the issuer does: it is asked during at
	// most one part in cosignShare of the time, by each proxy.
	cosignShare = 20
	// cosignTimeout bounds one question.
	cosignTimeout = 10 * time.Second
)

// cosign has the issuer sign the checkpoints of the audit log: from then on
// nobody on this machine can take a record back unseen.
func (a *Agent) cosign(ctx context.Context) error {
	if a.cfg.Tree == nil {
		return nil
	}
	var c cosigner
	for pause := cosignEvery; wait(ctx, pause); {
		began := time.Now()
		err := c.round(ctx, a)
		pause = max(cosignEvery, cosignShare*time.Since(began))
		if err != nil && ctx.Err() == nil {
			a.noticed(err)
			pause = max(pause, retryMax)
		}
		c.tell(a, err)
	}
	return nil
}

// A cosigner remembers what the issuer has signed.
type cosigner struct {
	name string // of the log
	have uint64
	// said is what was logged last, so that it is said once.
	said string
}

// round asks once if there is something new, and twice if the issuer knows
// another size than we do.
func (c *cosigner) round(ctx context.Context, a *Agent) error {
	self, err := a.Self()
	node := a.node.Current()
	if err != nil || node == nil || len(node.Identities) == 0 {
		return nil //nolint:nilerr // no identity yet
	}
	if name := audit.LogName(self.ID, node.Identities[0].ID); name != c.name {
		c.name, c.have = name, 0
	}
	if a.cfg.Tree.Size() == c.have {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, cosignTimeout)
	defer cancel()
	for range 2 {
		q, ok, err := a.cfg.Tree.Ask(c.name, c.have)
		if err != nil || !ok {
			return err
		}
		r, err := a.client.Cosign(ctx, self.ID, control.CosignRequest(q))
		if err != nil {
			return err
		}
		c.have = r.Have
		if len(r.Signed) > 0 {
			if err := a.cfg.Tree.Cosigned(c.name, r.Signed); err != nil {
				return err
			}
		}
		if r.Contradiction != "" {
			return &contradiction{r.Contradiction}
		}
		if len(r.Signed) > 0 || r.Have == q.OldSize {
			return nil
		}
	}
	return nil
}

// A contradiction is what the issuer says of a log that is not what it signed.
type contradiction struct{ what control.Contradiction }

func (c *contradiction) Error() string {
	switch c.what {
	case control.LogCut:
		return "the audit log is shorter than what the issuer has signed: records were taken from it, or an old copy of data_dir was put back"
	case control.LogForked:
		return "the audit log is not the one that the issuer has signed: records were changed, or an old copy of data_dir was put back and continued"
	case control.LogOther:
		return "this audit log takes the place of another that the issuer has signed"
	}
	return fmt.Sprintf("the issuer says of the audit log: %.40q", c.what)
}

// tell logs how it went, once for each change.
func (c *cosigner) tell(a *Agent, err error) {
	if err == nil {
		if c.said != "" {
			a.cfg.Log.Info("the issuer signs the checkpoints of the audit log", "records", c.have)
		}
		c.said = ""
		return
	}
	if now := err.Error(); now != c.said {
		a.cfg.Log.Error("checkpoint of the audit log not signed by the issuer; records are kept, and it is tried again", "err", err)
		c.said = now
	}
}
