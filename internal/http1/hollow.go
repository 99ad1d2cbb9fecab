package http1

// Hollow waits, for Accept, for the first of what follows the head of a chunked
// response, and says whether that is the end: Trailer has then what came with it.
// Nothing is taken away. What cannot be read is for Run to find.
func (x *Exchange) Hollow() bool {
	up := x.Up
	if x.Response.Body.Framing != Chunked {
		return false
	}
	for {
		var d decoder
		_, _, err := d.feed(nil, up.buf[up.r:min(up.w, up.r+maxTrailer)], false)
		switch {
		case err != nil || d.data > 0 || d.left > 0:
			return false
		case d.done():
			fields, err := d.fields(&up.lim)
			up.last = fields
			return err == nil
		}
		up.readWithin(up.bodyTimeout())
		if up.w-up.r >= maxTrailer || up.fill() != nil {
			return false
		}
	}
}
