package upstream

import (
	"cmp"
	"time"

	"sallyport/internal/mesh"
)

// A budget bounds the retries of all calls to a service: in the ten seconds that
// end now there may be a share of the calls, and some a second besides, so that a
// service with few calls can be retried at all. Retries are then never what
// brings a service down that is late.
type budget struct {
	share, floor int64
	window       counts // x counts retries
	well         tally  // of the calls that went well, which window has not
}

// budgetWindow is what the share and the floor are counted over.
const budgetWindow = 10 * time.Second

func newBudget(cfg mesh.Budget) *budget {
	const width = int64(budgetWindow / buckets)
	return &budget{
		share: int64(cmp.Or(cfg.Share, 2000)), floor: int64(cmp.Or(cfg.Floor, 10)),
		window: counts{width: width}, well: tally{width: width},
	}
}

// call counts a call that did not go well, without its retries.
func (b *budget) call(now int64) { b.window.add(now, false, false) }

// spend takes one retry, if it is there. Retries that ask in the same moment may
// exceed the budget by their number.
func (b *budget) spend(now int64) bool {
	if b.left(now) <= 0 {
		return false
	}
	b.window.slot(now).x.Add(1)
	return true
}

// left is how many retries there may be now.
func (b *budget) left(now int64) int64 {
	calls, _, retries := b.window.sum(now)
	calls += b.well.grown(now)
	return calls*b.share/mesh.Whole + b.floor*int64(budgetWindow/time.Second) - retries
}
