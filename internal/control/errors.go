package control

import (
	"context"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// What a caller of a Client decides on. Each arrives wrapped in a sentence that
// names the next step.
var (
	// ErrUnreachable: no issuer answered. Trying again may help.
	ErrUnreachable = errors.New("issuer unreachable")
	// ErrTrustDomain: the issuer that answered serves another trust domain.
	ErrTrustDomain = errors.New("wrong trust domain")
	// ErrUntrusted: who answered does not prove to be the issuer.
	ErrUntrusted = errors.New("issuer not trusted")
	// ErrClock: this machine's clock is outside the issuer's validity.
	ErrClock = errors.New("clock outside the issuer's validity")
	// ErrMustReattest: the agent's SVID is expired, unknown or replaced.
	ErrMustReattest = errors.New("agent must attest again")
	// ErrBanned: the operator has banned the agent.
	ErrBanned = errors.New("agent is banned")
	// ErrTokenUnknown, ErrTokenExpired and ErrTokenUsed: the join token cannot
	// be redeemed.
	ErrTokenUnknown = errors.New("join token is unknown")
	ErrTokenExpired = errors.New("join token has expired")
	ErrTokenUsed    = errors.New("join token is already used")
	// ErrFailed: the issuer could not do it now. Trying again may help.
	ErrFailed = errors.New("issuer failed")
	// ErrRefused: the issuer understood and said no, for another reason.
	ErrRefused = errors.New("issuer refused")
)

// A Refusal is why evidence was not accepted.
type Refusal string

// The closed set of refusals. RefusalNone stands for no refusal.
const (
	RefusalNone         Refusal = ""
	RefusalTokenUnknown Refusal = "token_unknown"
	RefusalTokenExpired Refusal = "token_expired"
	RefusalTokenUsed    Refusal = "token_used"
	RefusalEvidence     Refusal = "evidence"
	RefusalBanned       Refusal = "banned"
	RefusalKind         Refusal = "unknown_attestor"
)

// refusalText is what crosses the wire for each refusal of evidence.
var refusalText = map[Refusal]string{
	RefusalTokenUnknown: "join token is unknown",
	RefusalTokenExpired: "join token has expired",
	RefusalTokenUsed:    "join token is already used by another key",
	RefusalEvidence:     "node attestation failed",
}

// refuse makes the error that crosses the wire as it stands.
func refuse(c codes.Code, format string, args ...any) error {
	return status.Errorf(c, format, args...)
}

// refuseAgent says why an agent's identity does not count, as SPIRE does.
func refuseAgent(why types.PermissionDeniedDetails_Reason, format string, args ...any) error {
	return detailed(codes.PermissionDenied, &types.PermissionDeniedDetails{Reason: why}, format, args...)
}

// refuseEvidence says why evidence does not count. An unknown reason is told
// as RefusalEvidence.
func refuseEvidence(why Refusal) error {
	text, ok := refusalText[why]
	if !ok {
		why, text = RefusalEvidence, refusalText[RefusalEvidence]
	}
	return detailed(codes.PermissionDenied, &meshpb.Refusal{Reason: string(why)}, "%s", text)
}

func detailed(c codes.Code, d protoadapt.MessageV1, format string, args ...any) error {
	st := status.New(c, fmt.Sprintf(format, args...))
	if with, err := st.WithDetails(d); err == nil {
		st = with
	}
	return st.Err()
}

// Unfit makes an error of an Authority, or of what else answers a call, that is
// told to the caller: no such request is ever answered otherwise.
func Unfit(err error) error { return refuse(codes.InvalidArgument, "%s", plain(err.Error())) }

// Unready is Unfit for what the state of the issuer forbids.
func Unready(err error) error { return refuse(codes.FailedPrecondition, "%s", plain(err.Error())) }

// notHeld says that there is no bundle of a trust domain: mesh.ErrNotFound, and
// told to the caller.
type notHeld struct{ td spiffeid.TrustDomain }

func (e notHeld) Error() string { return e.GRPCStatus().Message() }
func (e notHeld) Unwrap() error { return mesh.ErrNotFound }
func (e notHeld) GRPCStatus() *status.Status {
	return status.Newf(codes.NotFound, "this issuer holds no bundle of %.255q", e.td.Name())
}

// during says what failed and for whom, unless the caller is to be told.
func during(err error, doing string, id spiffeid.ID) error {
	if known, ok := crosses(err); ok {
		return known
	}
	return fmt.Errorf("%s %s: %w", doing, id, err)
}

// crosses reports whether err may cross the wire as it is: a refusal of ours,
// or what gRPC itself made of a broken stream.
func crosses(err error) (error, bool) {
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err, true
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err(), true
	}
	return nil, false
}
