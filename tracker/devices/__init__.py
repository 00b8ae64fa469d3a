"""What devices wrote: dirty bits of VFIO containers and iommufds, by guest page."""
