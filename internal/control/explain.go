package control

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/control/meshpb"
)

// What to do next.
const (
	nextToken   = "make a token with 'sallyport token create' and attest again"
	nextBanned  = "ask the operator of the issuer to lift the ban"
	nextReach   = "check that the issuer runs and that its address is right"
	nextRefused = "see the issuer's log"
)

// explain turns the error of a call into a sentence around a sentinel.
func (c *Client) explain(ctx context.Context, verb string, l *link, err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%s: %w", verb, err)
	}
	if st.Code() == codes.Unavailable {
		defer c.discard(l)
		return fmt.Errorf("%s: %w", verb, c.unreachable(l, st.Message()))
	}
	if st.Code() == codes.Canceled || st.Code() == codes.DeadlineExceeded {
		if fault := l.lastFault(); fault != nil {
			return fmt.Errorf("%s: %w", verb, c.unreachable(l, st.Message()))
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", verb, ctx.Err())
		}
		return fmt.Errorf("%s: %w: %s; %s", verb, ErrUnreachable, plain(st.Message()), nextReach)
	}
	err = refusal(st)
	if errors.Is(err, ErrMustReattest) && c.moved(l) {
		err = fmt.Errorf("%w: the agent's SVID was renewed meanwhile; try again", ErrFailed)
	}
	return fmt.Errorf("%s: %w", verb, err)
}

// unreachable says why no issuer answered.
func (c *Client) unreachable(l *link, text string) error {
	where := strings.Join(c.cfg.Addresses, ", ")
	fault := l.lastFault()
	for _, known := range []error{ErrClock, ErrTrustDomain, ErrUntrusted} {
		if errors.Is(fault, known) {
			return fmt.Errorf("issuer at %s: %w", where, fault)
		}
	}
	if fault != nil {
		return fmt.Errorf("%w at %s: %w; %s", ErrUnreachable, where, fault, nextReach)
	}
	// The issuer ends the handshake with an alert when it does not accept the
	// client certificate; in TLS 1.3 this is seen after the handshake only.
	if l.leaf != nil && strings.Contains(text, alertText) {
		return fmt.Errorf("%w: the issuer at %s does not accept its SVID; %s", ErrMustReattest, where, nextToken)
	}
	return fmt.Errorf("%w at %s: %s; %s", ErrUnreachable, where, plain(text), nextReach)
}

// refusal reads what the issuer says of a call that reached it.
func refusal(st *status.Status) error {
	text := plain(st.Message())
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *types.PermissionDeniedDetails:
			switch d.GetReason() {
			case types.PermissionDeniedDetails_AGENT_BANNED:
				return fmt.Errorf("%w: %s; %s", ErrBanned, text, nextBanned)
			case types.PermissionDeniedDetails_AGENT_EXPIRED,
				types.PermissionDeniedDetails_AGENT_NOT_ATTESTED,
				types.PermissionDeniedDetails_AGENT_NOT_ACTIVE,
				types.PermissionDeniedDetails_AGENT_MUST_REATTEST:
				return fmt.Errorf("%w: %s; %s", ErrMustReattest, text, nextToken)
			}
		case *meshpb.Refusal:
			switch Refusal(d.GetReason()) {
			case RefusalTokenUnknown:
				return fmt.Errorf("%w; %s", ErrTokenUnknown, nextToken)
			case RefusalTokenExpired:
				return fmt.Errorf("%w; %s", ErrTokenExpired, nextToken)
			case RefusalTokenUsed:
				return fmt.Errorf("%w; %s", ErrTokenUsed, nextToken)
			}
		}
	}
	switch st.Code() {
	case codes.Internal, codes.Unknown, codes.ResourceExhausted, codes.Aborted, codes.DataLoss:
		return fmt.Errorf("%w: %s; %s", ErrFailed, text, nextRefused)
	}
	return fmt.Errorf("%w: %s", ErrRefused, text)
}

// final reports whether trying again without attesting again is vain.
func final(err error) bool {
	return errors.Is(err, ErrMustReattest) || errors.Is(err, ErrBanned) || errors.Is(err, errSource)
}
